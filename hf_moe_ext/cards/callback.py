"""Our card in what `Trainer.push_to_hub` uploads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_moe_ext.cards.rendering import write_card


class ModelCardCallback(TrainerCallback):
    """Puts our card back over the draft that `Trainer.push_to_hub` writes; for PEFT models.

    The Trainer writes its draft after everything is saved and then asks the PEFT model to complete it, which is the last
    moment before the upload: the model passed to the callback is given a method of that name that writes our card. No class
    of a library is changed. A model without adapters is asked nothing; push its folder with `hf_moe_ext.push`.

    Args:
        metrics: A recipe's `metrics.json`, or what it holds; None for a card without results.
        options: The rest of `cards.render_card`, such as `license`.
    """

    def __init__(self, metrics: Mapping[str, Any] | str | Path | None = None, **options: Any) -> None:
        self.metrics, self.options = metrics, options

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Give the model its method."""
        complete = getattr(type(model), "create_or_update_model_card", None)
        if complete is None:
            return

        def write(output_dir: str) -> None:
            complete(model, output_dir)
            if Path(output_dir, "adapter_config.json").is_file():  # not yet there when a first save begins
                write_card(output_dir, self.metrics, **self.options)

        model.create_or_update_model_card = write
