"""What the inputs of one forward say about its tokens: which count, which form a sequence, which carry the loss."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_moe_ext.ops.routing import TokenGroups

_CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seqlens", "cu_seq_lens_k")
_IGNORED = -100  # the label of a token without loss, everywhere in Transformers


@dataclass(frozen=True)
class LossShare:
    """With which weight each loss token enters the loss, and which sequence it belongs to.

    Attributes:
        values: [rows, tokens] (or [rows]) weight of each loss token, such that ``loss = sum(values * nats)``; where the
            trainer sums the log-probabilities itself, minus one at each token that counts.
        sequences: the groups of the flattened values.
    """

    values: Tensor
    sequences: TokenGroups

    def weights(self, gradient: Tensor) -> Tensor:
        """[sequences] weight of each sequence in the step, from the gradient of the loss [] or of the values' shape."""
        # Labels may have stayed on another device than the loss.
        return self.sequences.sum((gradient * self.values.to(gradient.device)).reshape(-1))

    def attach(self, value: Tensor, objective: Tensor) -> Tensor:
        """``value`` unchanged, with the gradient of ``objective`` [sequences], weighted by the shares, behind it."""
        silent = objective - objective.detach()
        if value.ndim == 0:
            return value + (self.weights(torch.ones_like(value)) * silent).sum().to(value.dtype)
        values = self.values.to(value.device)
        return value + (values * self.sequences.spread(silent, values.numel()).view_as(values)).to(value.dtype)


def read_rows(inputs: dict[str, Any]) -> Tensor | None:
    """The tensor that carries the batch: ids, embeddings, or the first tensor of a model of another kind."""
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            return inputs[name]
    return next((value for value in inputs.values() if isinstance(value, Tensor)), None)


def tokens_per_row(rows: Tensor) -> int:
    """Of ids [rows, tokens] or embeddings [rows, tokens, hidden]; features [rows, hidden] are one token each."""
    features = rows.ndim == 2 and rows.is_floating_point()
    return 1 if rows.ndim < 2 or features else rows.shape[1]


def read_sequences(inputs: dict[str, Any], rows: Tensor) -> TokenGroups:
    """The sequences of a batch [rows, tokens, ...] without their padding; several in a row where it is packed."""
    count, tokens = rows.shape[0], tokens_per_row(rows)
    mask = token_mask(inputs.get("attention_mask"), tokens)
    starts = _find_starts(inputs, count, tokens)
    if starts is None:
        return TokenGroups(count, mask)
    starts[:, 0] = True
    return TokenGroups(count * tokens, mask, starts.reshape(-1).cumsum(0) - 1)


def token_mask(attention_mask: Any, tokens: int) -> Tensor | None:
    """[rows * tokens] True where a token is not padding; None where nothing is known, so all count."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -tokens:].bool().reshape(-1)


def is_packed(inputs: dict[str, Any]) -> bool:
    """Whether a row holds several sequences: by its cumulative lengths, or by positions that begin again."""
    if any(inputs.get(name) is not None for name in (*_CUMULATIVE_LENGTHS, "seq_idx")):
        return True
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] < 2:
        return False  # one token, as in decoding, needs no look at its value, which would wait for the device
    starts = positions == 0
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        starts = starts & mask.bool()
    started = starts.cumsum(dim=1) > 0
    # A real token at position 0 after another 0 and something else; left padding repeats the 0.
    again = starts[:, 1:] & started[:, :-1] & ~starts[:, :-1]
    return bool(again.any())


def share_of_loss(inputs: dict[str, Any], sequences: TokenGroups, rows: int, shifts_labels: bool) -> LossShare:
    """The weights of a loss that is the mean over its tokens, or their sum over ``num_items_in_batch``.

    Args:
        inputs: the model's.
        sequences: of the input's tokens.
        rows: of the batch.
        shifts_labels: the model predicts the label of the next position.
    """
    labels, shifted = inputs.get("shift_labels"), False
    if labels is None:
        labels, shifted = inputs.get("labels"), shifts_labels
    if not isinstance(labels, Tensor) or labels.shape[0] != rows:
        # A loss we cannot read: every sequence counts alike.
        device = None if sequences.mask is None else sequences.mask.device
        return LossShare(torch.full((rows,), 1.0 / rows, device=device), _labels_of(sequences, rows, 1, False))
    if shifted and labels.ndim > 1:
        labels = labels[:, 1:]
    # In float64, so that a float64 model is not held back by it; MPS has none.
    counted = labels.ne(_IGNORED).to(torch.float32 if labels.device.type == "mps" else torch.float64)
    step_tokens = inputs.get("num_items_in_batch")
    values = counted / (counted.sum().clamp(min=1) if step_tokens is None else step_tokens)
    return LossShare(values, _labels_of(sequences, rows, values[0].numel(), shifted))


def share_of_log_probs(log_probs: Tensor, label_mask: Tensor | None, sequences: TokenGroups) -> LossShare:
    """The weights where a trainer sums ``-log_probs`` [rows, tokens] itself, as TRL's SFT does.

    Each token's weight is minus the gradient that reaches it. Positions outside the loss are zeros there, yet receive a
    gradient: ``label_mask`` leaves them out.
    """
    counted = torch.ones_like(log_probs) if label_mask is None else label_mask.to(log_probs.dtype)
    rows, tokens = log_probs.shape
    total = None if sequences.segment is None else sequences.segment.numel() // rows
    return LossShare(-counted, _labels_of(sequences, rows, tokens, total is not None and tokens == total - 1))


def _labels_of(sequences: TokenGroups, rows: int, tokens: int, shifted: bool) -> TokenGroups:
    """The sequences of the labels [rows, tokens], from those of the input's tokens."""
    if sequences.segment is None:
        return TokenGroups(sequences.num_groups)
    segment = sequences.segment.view(rows, -1)[:, 1 if shifted else 0 :]
    if segment.shape[1] != tokens:  # labels of another length (prompt tuning, images): by their row's first sequence
        segment = segment[:, :1].expand(rows, tokens)
    return TokenGroups(sequences.num_groups, None, segment.reshape(-1))


def _find_starts(inputs: dict[str, Any], rows: int, tokens: int) -> Tensor | None:
    """[rows, tokens] True where the next sequence of a packed row begins; None where every row is one sequence."""
    for name, step in (("seq_idx", 0), ("position_ids", 1)):
        ids = inputs.get(name)
        if isinstance(ids, Tensor) and ids.shape == (rows, tokens):
            starts = torch.zeros_like(ids, dtype=torch.bool)
            starts[:, 1:] = ids[:, 1:] != ids[:, :-1] + step
            return starts
    for name in _CUMULATIVE_LENGTHS:
        ends = inputs.get(name)
        if isinstance(ends, Tensor) and ends.ndim == 1:
            starts = torch.zeros(rows * tokens + 1, dtype=torch.bool, device=ends.device)
            return starts.index_fill(0, ends.long(), True)[:-1].view(rows, tokens)
    return None
