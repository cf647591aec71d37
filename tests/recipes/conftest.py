"""The recipe's folder importable as it is for the script, and small stand-ins for its text and its models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

_FUNCTION = '''
def {verb}_{noun}_{i}(self, value):
    """{Verb} the {noun} of kind {i} and return it."""
    self.{noun} = value + {i}
    return self.{noun}
'''


@pytest.fixture(scope="session")
def recipes() -> Path:
    """The folder of the recipes."""
    return RECIPES


@pytest.fixture(scope="session")
def source_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty modules of four documented functions each, in place of the standard library."""
    folder = tmp_path_factory.mktemp("source")
    verbs, nouns = ("read", "write", "count", "close"), ("buffer", "header", "socket", "table", "window")
    for i in range(40):
        noun = nouns[i % len(nouns)]
        text = "".join(_FUNCTION.format(verb=v, Verb=v.capitalize(), noun=noun, i=i) for v in verbs)
        (folder / f"module_{i}.py").write_text(f'"""Module {i}: all about a {noun}."""\n\nimport os\n{text}')
    return folder


@pytest.fixture(scope="session")
def base_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests' quickstart base is kept: built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def quickstart_flags(source_dir: Path, base_cache: Path) -> list[str]:
    """The default run with everything small."""
    settings = {
        "base_source_dir": source_dir,
        "base_cache_dir": base_cache,
        "base_max_steps": 5,
        "allow_weak_base": True,
        "max_length": 96,
        "max_steps": 4,
        "warmup_steps": 1,
        "logging_steps": 1,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "max_new_tokens": 4,
        "num_generations": 4,
        "use_cpu": True,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="session")
def tokenizer(source_dir: Path):
    """A byte-level BPE of the tests' text."""
    from quickstart.corpus import read_corpus
    from quickstart.pretrain import train_tokenizer

    return train_tokenizer(read_corpus(source_dir).train, 400)


@pytest.fixture(scope="session")
def olmoe_dir(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMoE with its tokenizer, saved."""
    from quickstart.pretrain import BaseSettings, build_model

    folder = tmp_path_factory.mktemp("olmoe")
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = build_model(BaseSettings(num_experts=4, **sizes), tokenizer)
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_dir(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, which has no MoE block, with its tokenizer, saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def json_file(tmp_path: Path) -> Path:
    """Twelve questions with answers."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"what is {i}?\n", "completion": f"it is {i}"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_script(recipes: Path):
    """Run the script in a process of its own; one thread, so that it is as fast beside other tests."""
    import os

    def run(
        *words: object, launcher: tuple[str, ...] = (), script: str = "finetune.py", **options
    ) -> subprocess.CompletedProcess:
        command = [sys.executable, *launcher, str(recipes / script), *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **options)

    return run
