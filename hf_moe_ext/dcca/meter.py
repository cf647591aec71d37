"""Bytes really handed to the all-to-alls of expert parallelism, read where torch is about to run them.

A mode of torch's dispatcher sees each call with its tensor and split sizes; nothing is replaced in any library, and
nothing is left behind. It sees the stock ``all_to_all`` and our ``latent_all_to_all`` alike. Autograd carries the mode
to its own threads, so backward passes are seen too.
"""

from dataclasses import asdict, dataclass, fields
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

Direction = Literal["dispatch", "combine"]
Pass = Literal["forward", "backward", "recompute"]
Kind = Literal["payload", "metadata"]


@dataclass
class Flow:
    """What went one way.

    Attributes:
        num_calls: collectives.
        num_rows: rows handed over, those for the own rank included; of metadata, entries.
        num_own_rows: rows for the own rank, which use no link.
        off_rank_bytes: bytes for other ranks.
        own_bytes: bytes for the own rank.
        time_s: seconds from the call to the received rows, if they are timed.
    """

    num_calls: int = 0
    num_rows: int = 0
    num_own_rows: int = 0
    off_rank_bytes: int = 0
    own_bytes: int = 0
    time_s: float = 0.0

    def add(self, other: "Flow") -> None:
        """Add what another flow counted."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


Key = tuple[Kind, Direction, Pass]
# In a fixed order, so that several processes can sum them as one tensor.
KEYS: tuple[Key, ...] = (
    ("payload", "dispatch", "forward"),
    ("payload", "combine", "forward"),
    ("payload", "combine", "backward"),
    ("payload", "dispatch", "backward"),
    ("payload", "dispatch", "recompute"),
    ("payload", "combine", "recompute"),
    ("metadata", "dispatch", "forward"),
    ("metadata", "dispatch", "backward"),
    ("metadata", "dispatch", "recompute"),
)


class TrafficMeter:
    """Counts the all-to-alls of expert parallelism on this rank while it is entered; enter it again to go on.

    Payload is hidden states and gradients of them; metadata is integers: counts, ids, and routing weights and their
    gradients, which our dispatcher sends as bits. A ``backward`` combine carries the gradient of a combine, so it goes
    the way a dispatch does.

    Args:
        group: count only this process group; by default every all-to-all of the process is counted. Give the
            expert-parallel group if the model uses all-to-alls elsewhere, as for long sequences.
        timed: also measure the time of each call, by waiting for it at once; what overlaps otherwise is then serial.

    Example:
        ``with TrafficMeter() as meter: model(**batch).loss.backward()`` and then ``meter.bytes("payload")``.

    Which payload of the stock dispatcher is dispatch and which combine is told by their order, which is fixed: combine
    follows dispatch forward and precedes it backward.
    """

    def __init__(self, group: ProcessGroup | None = None, timed: bool = False) -> None:
        self.group_name = None if group is None else group.group_name
        self.timed = timed
        self.flows: dict[Key, Flow] = {key: Flow() for key in KEYS}
        self._next: dict[str, Direction] = {}  # by pass and group
        self._mode: _Mode | None = None

    def __enter__(self) -> "TrafficMeter":
        if self._mode is not None:
            raise RuntimeError("this TrafficMeter is counting already; leave it first, or make a second one")
        self._mode = _Mode(self)
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(*error)

    def bytes(self, kind: Kind | None = None, direction: Direction | None = None, part: Pass | None = None) -> int:
        """Bytes for other ranks, of all flows or of those named."""
        wanted = (kind, direction, part)
        return sum(
            flow.off_rank_bytes
            for key, flow in self.flows.items()
            if all(w is None or w == name for w, name in zip(wanted, key, strict=True))
        )

    def as_dict(self) -> list[dict[str, Any]]:
        """A row per flow that had calls."""
        return [
            {"kind": kind, "direction": direction, "pass": part, **asdict(flow)}
            for (kind, direction, part), flow in self.flows.items()
            if flow.num_calls
        ]

    def _count(self, sent: Tensor, splits: list[int], group: ProcessGroup, time_s: float) -> None:
        part = _current_pass()
        if sent.is_floating_point():
            first: Direction = "combine" if part == "backward" else "dispatch"
            direction = self._next.get(part + group.group_name, first)
            self._next[part + group.group_name] = "combine" if direction == "dispatch" else "dispatch"
            kind: Kind = "payload"
        else:
            kind, direction = "metadata", "dispatch"
            if part != "backward":  # counts come first: what came before is over
                self._next.clear()
        row_bytes = sent.shape[1:].numel() * sent.element_size()
        rows = sent.size(0) if sent.dim() else 1
        own = splits[group.rank()] if splits else rows // group.size()
        self.flows[kind, direction, part].add(Flow(1, rows, own, (rows - own) * row_bytes, own * row_bytes, time_s))


def _current_pass() -> Pass:
    """Whether autograd runs an all-to-all's own backward, a layer again for it, or is not at work."""
    node = torch._C._current_autograd_node()
    if node is None:
        return "forward"
    name = node.name().replace("_", "").lower()
    own = name in ("sendrowsbackward", "returnrowsbackward") or "alltoall" in name
    return "backward" if own else "recompute"


class _Mode(TorchDispatchMode):
    def __init__(self, meter: TrafficMeter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _read_call(func, args)
        if call is None or self.meter.group_name not in (None, call[2].group_name):
            return func(*args, **(kwargs or {}))
        if any(kind not in (torch.Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # a pending result of another collective unfolds first, then comes here as itself
        start = perf_counter()
        result = func(*args, **(kwargs or {}))
        time_s = 0.0
        if self.meter.timed:
            _wait(result)
            time_s = perf_counter() - start
        self.meter._count(*call, time_s)
        return result


def _read_call(func: Any, args: Any) -> tuple[Tensor, list[int], ProcessGroup] | None:
    """(tensor sent, rows per rank or [] for equal ones, group) of an all-to-all; None for any other operator."""
    packet = getattr(func, "_overloadpacket", None)
    if packet is torch.ops._c10d_functional.all_to_all_single:
        sent, _, splits, group = args[:4]
        if not isinstance(group, ProcessGroup):
            group = torch.distributed.distributed_c10d._resolve_process_group(group)
        return sent, list(splits), group
    if packet is torch.ops.c10d.alltoall_base_:
        _, sent, group, _, splits = args[:5]
        return sent, list(splits), ProcessGroup.unbox(group)
    return None


def _wait(result: Any) -> None:
    if isinstance(result, Tensor):
        torch.ops._c10d_functional.wait_tensor(result)
    else:
        result.wait()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
