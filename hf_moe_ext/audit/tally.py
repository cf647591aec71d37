"""``RouterTally``: the sums of one router's events, kept on the layer's device, and how processes add theirs up."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from hf_moe_ext.audit.measures import count_choices, count_coactivation, distribution_sums
from hf_moe_ext.audit.reading import RouterReading

NUM_SUMS = 5  # of measures.distribution_sums


@dataclass
class RouterTally:
    """Sums over the tokens of one router. Adding an event waits for nothing.

    Attributes:
        top_k: choices per token.
        counts: [slices + 1, num_experts] int64 tokens per data slice and expert; row 0: of no slice.
        tokens: [] int64 that were routed.
        sums: [5] of ``distribution_sums``, float64 where the device has it.
        coactivation: [num_experts, num_experts] int64; None where nobody asked.
    """

    top_k: int
    counts: Tensor
    tokens: Tensor
    sums: Tensor
    coactivation: Tensor | None

    @classmethod
    def empty(
        cls, num_experts: int, top_k: int, device: torch.device, coactivation: bool, num_slices: int = 0
    ) -> "RouterTally":
        """Nothing seen yet."""
        wide = torch.float32 if device.type == "mps" else torch.float64
        counts = torch.zeros(num_slices + 1, num_experts, dtype=torch.int64, device=device)
        together = torch.zeros(num_experts, num_experts, dtype=torch.int64, device=device) if coactivation else None
        tokens = torch.zeros((), dtype=torch.int64, device=device)
        return cls(top_k, counts, tokens, torch.zeros(NUM_SUMS, dtype=wide, device=device), together)

    @property
    def num_experts(self) -> int:
        """Ids the router can send."""
        return self.counts.shape[1]

    def add(
        self, index: Tensor, weights: Tensor, probabilities: Tensor | None, mask: Tensor | None, slices: Tensor | None
    ) -> None:
        """Add one call of the router.

        Args:
            index: [tokens, top_k] chosen experts.
            weights: [tokens, top_k].
            probabilities: [tokens, num_experts], or None.
            mask: [tokens] True where a token counts; None counts all.
            slices: [tokens] number of each token's slice, from 0 on; None: of no slice.
        """
        num_groups = len(self.counts)
        groups = None if slices is None else slices + 1
        self.counts += count_choices(index, self.num_experts, mask, groups, num_groups)
        self.tokens += len(index) if mask is None else mask.sum()
        if probabilities is not None:
            self.sums += distribution_sums(probabilities, mask)
        else:
            invalid = ~torch.isfinite(weights).all(dim=-1)
            self.sums[-1] += (invalid if mask is None else invalid & mask).sum()
        if self.coactivation is not None:
            self.coactivation += count_coactivation(index, self.num_experts, mask)

    def grow(self, num_slices: int) -> None:
        """Make room for more slices."""
        missing = num_slices + 1 - len(self.counts)
        if missing > 0:
            self.counts = torch.cat([self.counts, self.counts.new_zeros(missing, self.num_experts)])

    def include(self, other: "RouterTally") -> None:
        """Add what another tally of the same router has."""
        self.grow(len(other.counts) - 1)
        other.grow(len(self.counts) - 1)
        self.counts += other.counts.to(self.counts.device)
        self.tokens += other.tokens.to(self.tokens.device)
        self.sums += other.sums.to(self.sums.device)
        if self.coactivation is not None and other.coactivation is not None:
            self.coactivation += other.coactivation.to(self.coactivation.device)

    def read(self, layer: str, router: str, slices: Mapping[str, int]) -> RouterReading:
        """The sums as numbers; ``slices``: name of a slice -> its number."""
        counts = self.counts.cpu().numpy()
        entropy, largest, margin, measured, invalid = self.sums.tolist()
        return RouterReading(
            layer=layer,
            router=router,
            num_experts=self.num_experts,
            top_k=self.top_k,
            tokens=int(self.tokens),
            counts=counts.sum(axis=0),
            entropy=entropy / measured if measured else None,
            max_probability=largest / measured if measured else None,
            margin=margin / measured if measured else None,
            coactivation=None if self.coactivation is None else self.coactivation.cpu().numpy(),
            slices={name: counts[number + 1] for name, number in slices.items()},
            invalid=round(invalid),
        )


Tallies = dict[tuple[str, str], RouterTally]  # by layer and router


def counts_here(model: nn.Module) -> bool:
    """Whether this process's tokens are to be counted: of those that see the same tokens, one does.

    The ranks of a tensor-parallel group see the same; those of data, expert or context parallelism see different ones.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is not None and "tp" in (mesh.mesh_dim_names or ()):
        return mesh.get_local_rank("tp") == 0
    tp_size = getattr(model, "tp_size", None) or 1
    return tp_size == 1 or distributed.get_rank() % tp_size == 0


def sum_tallies(tallies: Tallies, slices: dict[str, int], counted: bool) -> tuple[Tallies, dict[str, int]]:
    """Tallies of all processes together, which all of them get; every process must call it.

    Args:
        tallies: of this process; left as they are.
        slices: name -> number here; processes may number them differently.
        counted: False where another process sees the same tokens.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return tallies, slices
    shapes = {key: (t.num_experts, t.top_k, t.coactivation is not None) for key, t in tallies.items()}
    gathered: list = [None] * distributed.get_world_size()
    # A router that saw nothing here (an adapter that is off, a stage elsewhere) may have seen something there.
    distributed.all_gather_object(gathered, (shapes, list(slices)))
    all_shapes = {key: shape for shapes, _ in gathered for key, shape in shapes.items()}
    names = list(dict.fromkeys(name for _, names in gathered for name in names))
    device = next(iter(tallies.values())).counts.device if tallies else _own_device()
    result, flat = {}, []
    for key, (num_experts, top_k, coactivation) in all_shapes.items():
        whole = RouterTally.empty(num_experts, top_k, device, coactivation, len(names))
        if key in tallies and counted:
            own = tallies[key]
            whole.include(
                RouterTally(top_k, _renumber(own.counts, slices, names), own.tokens, own.sums, own.coactivation)
            )
        result[key] = whole
        flat += [whole.counts, whole.tokens, *([] if whole.coactivation is None else [whole.coactivation])]
    if result:
        _all_reduce(flat)
        _all_reduce([tally.sums for tally in result.values()])
    return result, {name: number for number, name in enumerate(names)}


def _renumber(counts: Tensor, slices: dict[str, int], names: list[str]) -> Tensor:
    """[len(names) + 1, num_experts] the rows of ``counts`` in the order of ``names``."""
    rows = counts.new_zeros(len(names) + 1, counts.shape[1])
    rows[0] = counts[0]
    for number, name in enumerate(names):
        if name in slices and slices[name] + 1 < len(counts):
            rows[number + 1] = counts[slices[name] + 1]
    return rows


def _all_reduce(tensors: list[Tensor]) -> None:
    """Sum tensors of one dtype in place, in one collective."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _own_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
