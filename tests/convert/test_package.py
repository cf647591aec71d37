"""The package's front: the function, whichever of package and module is imported first; and the root stays cheap."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "first", ["hf_moe_ext.convert.to_dcca", "hf_moe_ext.convert", "hf_moe_ext.convert.distillation"]
)
def test_the_function_has_the_name_of_its_module(first) -> None:
    code = f"import {first}\nfrom hf_moe_ext.convert import to_dcca\nassert not hasattr(to_dcca, '__path__') and callable(to_dcca)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)
