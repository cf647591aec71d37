"""The planner's arithmetic is for machines without torch, and answers at once."""

import subprocess
import sys

CODE = """
import importlib, pkgutil, sys
import hf_moe_ext.scaling as package
names = [found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names: importlib.import_module(name)
print(len(names), sorted({"torch", "transformers", "peft"} & set(sys.modules)))
"""


def test_no_module_of_scaling_loads_torch():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    count, loaded = result.stdout.split(" ", 1)
    assert int(count) >= 12, result.stderr
    assert loaded == "[]\n"
