"""Importing the package is cheap, and enough; in any order; also in spawned workers."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets")


def _run(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    loaded = _run(f"import hf_moe_ext, sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded == "[]"


def test_importing_transformers_too_still_loads_no_peft():
    # transformers itself is lazy; naming us beside it must not change that
    loaded = _run("import hf_moe_ext, transformers, sys; print('peft' in sys.modules)")
    assert loaded == "False"


def test_public_names_resolve_and_unknown_ones_are_named():
    names = _run("import hf_moe_ext; print(all(getattr(hf_moe_ext, n) for n in hf_moe_ext.__all__), dir(hf_moe_ext))")
    assert names.startswith("True [")
    assert "'PerftConfig'" in names
    error = _run(
        "import hf_moe_ext\ntry: hf_moe_ext.Nonsense\nexcept AttributeError as e: print(e)",
    )
    assert "no attribute 'Nonsense'; public names: AuditLog, " in error


IMPORTS = {
    "us": "import hf_moe_ext",
    "peft": "import peft",
    "transformers": "import transformers",
    "auto": "from transformers import AutoModelForCausalLM, Trainer",
    "tuners": "import peft.tuners.lora",
    "feature": "from hf_moe_ext import PerftConfig",
}
KNOWN = (
    "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as c, PEFT_TYPE_TO_TUNER_MAPPING as t, "
    "PEFT_TYPE_TO_PREFIX_MAPPING as p; print(c['PERFT'].__name__, t['PERFT'].__name__, p['PERFT'])"
)


@pytest.mark.parametrize(
    "order",
    [
        ("us", "peft"),
        ("peft", "us"),
        ("us", "transformers", "peft"),
        ("transformers", "us", "peft"),
        ("transformers", "peft", "us"),
        ("peft", "transformers", "us"),
        ("us", "auto"),
        ("auto", "us"),
        ("us", "tuners"),
        ("tuners", "us"),
        ("feature",),
        ("auto", "feature"),
    ],
)
def test_every_order_of_imports_registers(order):
    code = "; ".join(IMPORTS[name] for name in order)
    assert _run(f"{code}; {KNOWN}") == "PerftConfig PerftModel perft_"


def test_registering_twice_changes_nothing():
    code = (
        "import hf_moe_ext, importlib, peft; from hf_moe_ext import registry, PerftConfig, PerftModel; "
        "registry.install(); from hf_moe_ext.perft.config import PerftType; "
        "registry.register_tuner(PerftType.PERFT, PerftConfig, PerftModel); "
    )
    assert _run(code + KNOWN) == "PerftConfig PerftModel perft_"


def test_a_name_held_by_another_package_is_refused():
    code = """
import peft.mapping
class Other: pass
peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PERFT"] = Other
try:
    import hf_moe_ext
except RuntimeError as error:
    print(error)
"""
    assert "'PERFT' is already held by __main__.Other" in _run(code)


def test_a_spawned_worker_knows_the_type(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(
        """
import multiprocessing
import hf_moe_ext

def kind(config):
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    return type(config).__name__, PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].__name__

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(kind, (hf_moe_ext.PerftConfig(),)))
"""
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.stdout.strip() == "('PerftConfig', 'PerftModel')", result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import hf_moe_ext, transformers",
        "import transformers, hf_moe_ext",
        "from transformers import OlmoeConfig; import hf_moe_ext",
        "import hf_moe_ext; from transformers import OlmoeConfig",
        "import hf_moe_ext; from transformers import OlmoeForCausalLM",
        "import hf_moe_ext; from transformers import Trainer",
        "import hf_moe_ext; import transformers.models.mixtral.modeling_mixtral",
        "import hf_moe_ext; from transformers.distributed import DistributedConfig",
        "import hf_moe_ext; import peft",
    ],
)
def test_models_and_dispatch_are_known_in_any_order_of_imports(code):
    known = (
        "from transformers import AutoConfig, AutoModelForCausalLM; "
        "from transformers.distributed.expert_parallel import EPImplementationInterface as I; "
        "config = AutoConfig.for_model('olmoe_ext', moe_block='dcca', num_hidden_layers=1); "
        "import torch; torch.set_default_device('meta'); "
        "print(type(AutoModelForCausalLM.from_config(config)).__name__, 'latent_all_to_all' in I())"
    )
    assert _run(f"{code}; {known}").endswith("OlmoeExtForCausalLM True")
