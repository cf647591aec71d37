"""What lies in an adapter's folder beside its weights, and what may not."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import file_exists, try_to_load_from_cache
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

logger = logging.getLogger(__name__)

KEY_PREFIX = "base_model.model."  # PeftModel and its tuner, in front of every name on disk
_PICKLE = (
    "{} is a pickle, which can run code when it is read; PERFT adapters are "
    f"{SAFETENSORS_WEIGHTS_NAME} only. Save with safe_serialization=True (the default)"
)


def refuse_pickle(folder: Path) -> None:
    """Raise if the folder's only weights are a pickle."""
    if (folder / WEIGHTS_NAME).is_file() and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(_PICKLE.format(folder / WEIGHTS_NAME))


def refuse_pickle_on_hub(repo_id: str, subfolder: str | None = None, **hub: Any) -> None:
    """Raise if a Hub repository has no safetensors weights: PEFT would then read its pickle.

    Args:
        repo_id: the repository; one that cannot be reached is left to the loader.
        subfolder: folder of the adapter in it.
        hub: ``revision``, ``cache_dir`` and ``token``, as for a download.
    """
    prefix = f"{subfolder}/" if subfolder else ""
    cache = {key: value for key, value in hub.items() if key != "token"}
    if isinstance(try_to_load_from_cache(repo_id, prefix + SAFETENSORS_WEIGHTS_NAME, **cache), str):
        return
    pickled = isinstance(try_to_load_from_cache(repo_id, prefix + WEIGHTS_NAME, **cache), str)
    try:
        online = {key: value for key, value in hub.items() if key != "cache_dir"}
        pickled = not file_exists(repo_id, prefix + SAFETENSORS_WEIGHTS_NAME, **online)
    except Exception:  # offline, or no such repository: only the cache can be read then
        logger.debug("%s cannot be asked for its files", repo_id, exc_info=True)
    if pickled:
        raise ValueError(_PICKLE.format(f"{repo_id}/{prefix}{WEIGHTS_NAME}"))
