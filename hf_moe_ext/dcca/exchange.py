"""The exchanges of the dispatcher: differentiable, in flight together, and with one message when a peer is gone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

NAME = "latent_all_to_all"


class Route(NamedTuple):
    """The sizes of a layer's exchanges: what this rank sends to and receives from each rank of the group."""

    group: Any
    layer: str
    send_rows: list[int]
    receive_rows: list[int]
    send_pairs: list[int]
    receive_pairs: list[int]


class Exchange:
    """An all-to-all under way."""

    def __init__(self, rows: Tensor, receive: list[int], send: list[int], route: Route, what: str) -> None:
        self.rows, self.route, self.what = rows.contiguous(), route, what  # kept until they have been sent
        self.received = rows.new_empty(sum(receive), *rows.shape[1:])
        with explained(route.layer, what, route.group):
            self.work = distributed.all_to_all_single(
                self.received, self.rows, receive, send, group=route.group, async_op=True
            )

    def wait(self) -> Tensor:
        with explained(self.route.layer, self.what, self.route.group):
            self.work.wait()
        return self.received


@contextmanager
def explained(layer: str, what: str, group: Any) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # this rank's own
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        late = "timed out" in reason.lower() or "timeout" in reason.lower()
        cause, step = (
            ("did not answer in time", "raise `ddp_timeout` if that process is only slow, else ")
            if late
            else ("ended or closed its connection", "")
        )
        raise RuntimeError(
            f"{NAME}: the {what} exchange of {layer} failed on rank {group.rank()} of the {group.size()} that share its "
            f"experts, because another rank {cause}; {step}look for the first error in the other ranks' logs and resume "
            f"from the last checkpoint. The backend said: {reason}"
        ) from error


class SendRows(torch.autograd.Function):
    """Rows and metadata to the ranks of their experts, both exchanges in flight together; backward returns gradients.

    Inputs: rows [rows sent, width], weights [pairs sent], codes [pairs sent]. Outputs: the same as received.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, codes: Tensor, route: Route) -> tuple[Tensor, Tensor, Tensor]:
        ctx.route, ctx.weights_dtype = route, weights.dtype
        bits = _as_integers(weights)
        metadata = torch.stack([codes.to(bits.dtype), bits], dim=1)
        pending_metadata = Exchange(metadata, route.receive_pairs, route.send_pairs, route, "metadata")
        pending_rows = Exchange(rows, route.receive_rows, route.send_rows, route, "payload")
        codes, bits = pending_metadata.wait().unbind(1)
        codes = codes.long()
        ctx.mark_non_differentiable(codes)
        return pending_rows.wait(), _from_integers(bits, weights.dtype), codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, _: Tensor) -> tuple[Any, ...]:
        route = ctx.route
        pending: list[Exchange | None] = [None, None]
        if ctx.needs_input_grad[1]:
            bits = _as_integers(grad_weights)
            pending[1] = Exchange(bits, route.send_pairs, route.receive_pairs, route, "backward metadata")
        if ctx.needs_input_grad[0]:
            pending[0] = Exchange(grad_rows, route.send_rows, route.receive_rows, route, "backward payload")
        rows, weights = (exchange.wait() if exchange is not None else None for exchange in pending)
        return rows, None if weights is None else _from_integers(weights, ctx.weights_dtype), None, None


class ReturnRows(torch.autograd.Function):
    """Rows back to the ranks that sent them; backward sends."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return Exchange(rows, route.send_rows, route.receive_rows, route, "return").wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        route = ctx.route
        return Exchange(grad, route.receive_rows, route.send_rows, route, "backward return").wait(), None


def _as_integers(weights: Tensor) -> Tensor:
    """The bits of routing weights, so that they share an exchange with integers: int32, or int64 for float64."""
    if weights.dtype == torch.float64:
        return weights.contiguous().view(torch.int64)
    return weights.float().contiguous().view(torch.int32)


def _from_integers(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.contiguous().view(torch.float64 if bits.dtype == torch.int64 else torch.float32).to(dtype)
