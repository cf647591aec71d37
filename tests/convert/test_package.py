"""The package's front: the function, whichever of package and module is imported first; and the root stays cheap."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "first",
    ["hf_moe_ext.convert.to_dcca", "hf_moe_ext.convert", "hf_moe_ext.convert.distillation", "hf_moe_ext.convert.fold"],
)
def test_the_function_has_the_name_of_its_module(first) -> None:
    code = f"import {first}\nfrom hf_moe_ext.convert import fold, to_dcca\nassert callable(to_dcca) and callable(fold)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)
