"""Runs a model one decoder layer at a time, so that only one layer's weights are ever in memory.

The layer runs inside a model of its own family with a single layer, which builds masks and rotary embeddings itself; the
hidden states of all rows go in as input embeddings and come out before the last norm.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

_ROWS_PER_BATCH = 8


@dataclass(frozen=True)
class LayerRecord:
    """What one layer did with all rows.

    Attributes:
        hidden_states: [rows, length, H], the layer's output.
        block_inputs: [tokens, H] that router and experts received; tokens = rows * length, row by row.
        ids: [tokens, k], chosen experts.
        weights: [tokens, k], router weights.
        block_outputs: [tokens, H].
    """

    hidden_states: Tensor
    block_inputs: Tensor
    ids: Tensor
    weights: Tensor
    block_outputs: Tensor


class LayerRunner:
    """A model of one layer, whose weights are exchanged for those of each layer in turn.

    Args:
        config: an ``*_ext`` configuration.
        block: the MoE block, as in ``moe_block``.
        device: where it runs, in float32.
    """

    def __init__(self, config: Any, block: str, device: torch.device) -> None:
        settings = config.to_dict() | {"num_hidden_layers": 1, "moe_block": block}
        # It is given embeddings, not ids: a full table would be the largest thing in it.
        settings |= {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        settings |= {"dtype": "float32", "use_cache": False}
        if block == "standard":
            settings = {k: v for k, v in settings.items() if not k.startswith("moe_") or k == "moe_block"}
        self.model = AutoModel.from_config(type(config).from_dict(settings)).to(device).eval()
        self.norm, self.model.norm = self.model.norm, nn.Identity()
        self.layer = self.model.layers[0]
        self.device = device

    def load(self, state: dict[str, Tensor], layer: int) -> None:
        """Take a layer's weights, named as below ``model.layers.N.``; they are converted to float32.

        Raises:
            ValueError: a missing, unknown or mis-shaped tensor, by name.
        """
        try:
            self.layer.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"layer {layer} of the checkpoint does not fit its config.json: {error}") from error

    @torch.no_grad()
    def run(self, hidden_states: Tensor) -> LayerRecord:
        """Pass all rows [rows, length, H] through the layer, a few at a time."""
        inputs, ids, weights, outputs, hidden = [], [], [], [], []

        def record_router(_: nn.Module, args: tuple[Tensor, ...], result: tuple[Tensor, ...]) -> None:
            inputs.append(args[0].reshape(-1, args[0].shape[-1]))
            weights.append(result[1])
            ids.append(result[2])

        def record_block(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
            outputs.append(result.reshape(-1, result.shape[-1]))

        hooks = [
            self.layer.mlp.gate.register_forward_hook(record_router),
            self.layer.mlp.register_forward_hook(record_block),
        ]
        try:
            for rows in hidden_states.split(_ROWS_PER_BATCH):
                hidden.append(self.model(inputs_embeds=rows).last_hidden_state)
        finally:
            for hook in hooks:
                hook.remove()
        return LayerRecord(*(torch.cat(parts) for parts in (hidden, inputs, ids, weights, outputs)))

    @torch.no_grad()
    def perplexity(self, hidden_states: Tensor, token_ids: Tensor, norm: Tensor, head: Tensor) -> float:
        """Perplexity of the rows, from the last layer's output.

        Args:
            hidden_states: [rows, length, H].
            token_ids: [rows, length].
            norm: weight of the last norm [H].
            head: weight of the language-model head [vocabulary, H].
        """
        self.norm.weight.copy_(norm)
        head = head.to(self.device, torch.float32)
        nats = 0.0
        for hidden, ids in zip(hidden_states, token_ids.to(self.device), strict=True):
            logits = self.norm(hidden[:-1]) @ head.T
            nats += float(nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        mean = nats / (token_ids.shape[0] * (token_ids.shape[1] - 1))
        return float(torch.tensor(mean, dtype=torch.float64).exp())  # infinite, not an error, where it is too large
