"""Run by every Python that has this folder on ``PYTHONPATH``, before its program: see ``hf_moe_ext.launch``."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def _import_the_package() -> None:
    try:
        import hf_moe_ext  # noqa: F401 - importing it is what registers our types
    except ModuleNotFoundError as error:
        # Another environment's Python. Its program may need us or not; it must run, and must not be silently without.
        print(
            f"hf-moe run: {sys.executable} cannot import {error.name}, so it knows no PERFT adapters", file=sys.stderr
        )


def _run_the_next_sitecustomize() -> None:
    """What this file hides: a distribution or a coverage tool may have one of its own."""
    # For this process only; the variable that brought us stays in the environment for its children.
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _FOLDER]
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


_import_the_package()
_run_the_next_sitecustomize()
