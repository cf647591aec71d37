"""The package's front: one name, loaded when it is first asked for."""

import subprocess
import sys

import pytest


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, hf_moe_ext.convert as convert\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "assert callable(convert.to_dcca) and callable(convert.to_dcca)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_unknown_names_are_refused() -> None:
    import hf_moe_ext.convert

    with pytest.raises(AttributeError, match="has no attribute 'to_bigmac'; public names: to_dcca"):
        _ = hf_moe_ext.convert.to_bigmac
