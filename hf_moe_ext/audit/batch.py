"""What the input of one forward says about its tokens: which count, where they stand, and which part of the data they are."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

SLICE_KEY, EXAMPLE_KEY = "routing_slice_ids", "routing_example_ids"


class SliceNames(Sequence[str]):
    """Names of the slices of a batch's rows, held as numbers on the model's device; reading them waits for it.

    Attributes:
        ids: [rows] number of each row's slice.
        names: name of each number.
    """

    def __init__(self, ids: Tensor, names: Sequence[str]) -> None:
        self.ids, self.names = ids, tuple(names)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: Any) -> Any:
        ids = self.ids[row].tolist()
        return [self._name(i) for i in ids] if isinstance(ids, list) else self._name(ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self[:])

    def _name(self, number: int) -> str:
        return self.names[number] if number < len(self.names) else str(number)


@dataclass(frozen=True)
class BatchFacts:
    """What is known of the tokens of one forward pass; tensors on the device of the layer that routed them.

    Attributes:
        input_ids: [batch, length]; None for embeddings.
        mask: [tokens] True where a token counts (no padding); None counts all.
        positions: [tokens] place of each token in its sequence, counted from 0 without padding; -1 where it is not known.
        rows: [tokens] row of the batch.
        slices: name of the data slice of each batch row; None where nobody said.
        examples: id of the example in each batch row; None where nobody said.
    """

    input_ids: Tensor | None
    mask: Tensor | None
    positions: Tensor
    rows: Tensor
    slices: Sequence[str] | None = None
    examples: Sequence[int | str] | None = None

    def select(self, tokens: Tensor | None) -> "BatchFacts":
        """The facts of some tokens, by number; None: of all."""
        if tokens is None:
            return self
        mask = None if self.mask is None else self.mask[tokens]
        return replace(self, mask=mask, positions=self.positions[tokens], rows=self.rows[tokens])


_tag: ContextVar[tuple[Sequence[str] | None, Sequence[int | str] | None]] = ContextVar("tag", default=(None, None))


@contextmanager
def tag_batch(slices: Sequence[str] | None = None, examples: Sequence[int | str] | None = None) -> Iterator[None]:
    """Say which slice and example each row of the batches inside is; for loops of one's own, and for ``generate``.

    Args:
        slices: one name per row.
        examples: one id per row.

    Under beam search or several returned sequences, rows that follow each other share a name.
    """
    before = _tag.set((slices, examples))
    try:
        yield
    finally:
        _tag.reset(before)


def take_tags(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of a model without those of the audit, and those of the audit."""
    tags = {key: kwargs[key] for key in (SLICE_KEY, EXAMPLE_KEY) if key in kwargs}
    return {key: value for key, value in kwargs.items() if key not in tags}, tags


def read_batch(
    inputs: Mapping[str, Any],
    tags: Mapping[str, Any],
    names: Sequence[str],
    cached: int | Tensor,
    num_tokens: int,
    device: torch.device,
) -> BatchFacts | None:
    """The facts of a batch as a layer sees it.

    Args:
        inputs: the model's arguments by name.
        tags: of the batch (``take_tags``); else those of ``tag_batch`` hold.
        names: slice name of each number in the tags.
        cached: tokens the cache held when the pass began.
        num_tokens: rows that the layer routes.
        device: the layer's.

    Returns:
        None if these rows are not the tokens of the input: the model drops, packs or splits them.
    """
    ids = inputs.get("input_ids")
    rows = ids if isinstance(ids, Tensor) else inputs.get("inputs_embeds")
    if not isinstance(rows, Tensor) or rows.ndim < 2 or rows.shape[0] * rows.shape[1] != num_tokens:
        return None
    batch, length = rows.shape[:2]
    slices, examples = _tag.get()
    if SLICE_KEY in tags:
        slices = SliceNames(tags[SLICE_KEY].to(device), names)
    if EXAMPLE_KEY in tags:
        examples = tuple(tags[EXAMPLE_KEY].tolist())
    mask = read_mask(inputs, batch, length, cached, device)
    positions = read_positions(inputs, batch, length, cached, device)
    return BatchFacts(
        input_ids=ids.to(device) if isinstance(ids, Tensor) else None,
        mask=None if mask is None else mask.reshape(-1),
        positions=positions.reshape(-1),
        rows=torch.arange(batch, device=device)[:, None].expand(batch, length).reshape(-1),
        slices=_per_row("slices", slices, batch),
        examples=_per_row("examples", examples, batch),
    )


def read_mask(
    inputs: Mapping[str, Any], batch: int, length: int, cached: int | Tensor, device: torch.device
) -> Tensor | None:
    """[batch, length] True where a token of the input is none of padding; None where nothing is known, so all count."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Mapping):  # one for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.shape[0] != batch or mask.shape[-1] < length:
        return None
    if mask.ndim == 2:
        return mask[:, -length:].to(device).bool()
    # With a static cache `generate` gives [batch, 1, queries, keys]. A token attends to itself unless it is padding; a
    # query alone is a new token.
    if mask.ndim != 4 or mask.shape[2] != length or length == 1:
        return None
    keys = _following(cached, length, mask.device)
    own = mask[:, 0].gather(2, keys.clamp(max=mask.shape[3] - 1).view(1, length, 1).expand(batch, length, 1))[..., 0]
    return (own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2).to(device)


def read_positions(
    inputs: Mapping[str, Any], batch: int, length: int, cached: int | Tensor, device: torch.device
) -> Tensor:
    """[batch, length] place of each token in its sequence: as the model is told, else counted along the mask or cache."""
    given, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if isinstance(given, Tensor) and given.shape[-1] == length and given.ndim in (2, 3):
        plane = given[0] if given.ndim == 3 else given  # of several axes (images), the first is time
        if plane.shape[0] in (1, batch):
            return plane.to(device).expand(batch, length)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] >= length:
        return (mask.to(device).cumsum(dim=1) - 1)[:, -length:].clamp(min=0)
    return _following(cached, length, device).expand(batch, length)


def cached_length(inputs: Mapping[str, Any]) -> int | Tensor:
    """Tokens the cache holds now; a tensor where a static cache counts on the device. 0 where nobody will ask."""
    cache, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
    told = isinstance(mask, Tensor) and mask.ndim == 2
    if told or cache is None or not hasattr(cache, "get_seq_length"):
        return 0
    length = cache.get_seq_length()
    return length.clone() if isinstance(length, Tensor) else length  # the pass counts it up in place


def _following(cached: int | Tensor, length: int, device: torch.device) -> Tensor:
    """[length] the numbers from ``cached`` on."""
    return torch.arange(length, device=device) + (cached.to(device) if isinstance(cached, Tensor) else cached)


def _per_row(name: str, values: Sequence[Any] | None, batch: int) -> Sequence[Any] | None:
    if values is None or len(values) == batch:
        return values if values is None or isinstance(values, SliceNames) else tuple(values)
    if len(values) and batch % len(values) == 0:  # beams, or several returned sequences
        return tuple(value for value in values for _ in range(batch // len(values)))
    raise ValueError(
        f"{name} must be one per row of the batch, which has {batch}, got {len(values)}; give one for each"
    )
