"""What every test stands on: no network, a fixed seed, and the helpers of ``tests/support`` importable."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# One worker per core already; also for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Bit-equal tests are about our arithmetic: without this MKL may add up in another order where a tensor lies at another
# address, as one mapped from a file does (seen on an AMD EPYC).
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # after the environment is set


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    """No progress bars between the dots; warnings and errors still show."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What may take longest goes first, so that no worker is left with it at the end."""

    def limit(item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        return marker.args[0] if marker is not None and marker.args else 0

    items.sort(key=limit, reverse=True)
