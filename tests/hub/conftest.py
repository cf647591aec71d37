"""A Hub to push to, and a folder to push."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from support.hub_server import local_hub


@pytest.fixture
def hub(tmp_path: Path):
    with local_hub(tmp_path) as served:
        yield served
        assert served.tokens_at_storage == 0


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """What an adapter's folder holds after a run, as far as a push can tell."""
    folder = tmp_path / "run"
    (folder / "checkpoint-2").mkdir(parents=True)
    config = {
        "peft_type": "PERFT",
        "variant": "R",
        "r": 4,
        "base_model_name_or_path": "org/base",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"perft_A": np.arange(9000, dtype=np.float32)}, folder / "adapter_model.safetensors")
    (folder / "metrics.json").write_text(json.dumps({"loss": {"before": 3.0, "after": 2.5, "rows": 9}}))
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"pickle")
    return folder
