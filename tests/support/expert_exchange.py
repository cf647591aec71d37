"""What the ranks of ``tests/dcca`` run: experts reached through a dispatcher, and the same on one process."""

import os
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from transformers.distributed.expert_parallel import EpDispatchExpertsParallel

import hf_moe_ext.dcca.dispatch  # noqa: F401  (registers the dispatcher)
from hf_moe_ext.models.expert_gradients import divide_expert_gradients_once
from support import zoo
from support.distributed_models import load

WIDTH, NUM_EXPERTS, TOP_K = 8, 8, 3
BOTH = ("all_to_all", "latent_all_to_all")


class Case(NamedTuple):
    """One routed batch for `run_experts`; the tensors of rank n are those of number n."""

    hidden_states: list[Tensor]
    top_k_index: list[Tensor]
    top_k_weights: list[Tensor]


def build_experts(implementation: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Random gated experts; the same on every rank."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    config = OlmoeConfig(
        hidden_size=WIDTH, intermediate_size=12, num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, num_hidden_layers=1
    )
    config._experts_implementation = implementation
    experts = OlmoeExperts(config)
    generator = torch.Generator().manual_seed(5)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).mul(0.5).to(dtype)
    return experts


def build_case(
    sizes: Sequence[int],
    allowed: Sequence[int] = range(NUM_EXPERTS),
    dtype: torch.dtype = torch.float64,
    weights_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Case:
    """Tokens per rank, each routed to distinct experts out of ``allowed``."""
    generator = torch.Generator().manual_seed(seed)
    hidden, index, weights = [], [], []
    for size in sizes:
        hidden.append(torch.randn(size, WIDTH, generator=generator, dtype=torch.float64).to(dtype))
        choice = torch.rand(size, len(allowed), generator=generator).argsort(1)[:, :TOP_K]
        index.append(torch.tensor(list(allowed))[choice])
        weights.append(
            torch.rand(size, choice.size(1), generator=generator, dtype=torch.float64).to(weights_dtype or dtype)
        )
    return Case(hidden, index, weights)


def dispatched(implementation: str, name: str, tp_size: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """This rank's experts behind a dispatcher, over all ranks; ``tp_size`` consecutive ranks share a batch."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    world, rank = distributed.get_world_size(), distributed.get_rank()
    ep_mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    tp_mesh = DeviceMesh("cpu", torch.arange(world).view(-1, tp_size), mesh_dim_names=("dp", "tp"))["tp"]
    experts = build_experts(implementation, dtype)
    local = NUM_EXPERTS // world
    for parameter in experts.parameters():
        parameter.data = parameter.data[rank * local : (rank + 1) * local].clone()
    experts.num_experts, experts._is_expert_parallel = local, True
    return EpDispatchExpertsParallel().install_forward(experts, ep_mesh, tp_mesh=tp_mesh, ep_implementation=name)


def forward_backward(experts: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of every input and parameter, under an uneven loss."""
    hidden, index, weights = inputs
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    output = experts(hidden, index, weights)
    slope = torch.linspace(-1, 2, WIDTH, dtype=output.dtype)
    ((output * slope).sum() + (output**2).sum()).backward()
    found = {"output": output.detach(), "hidden_states": hidden.grad, "top_k_weights": weights.grad}
    return found | {name: parameter.grad for name, parameter in experts.named_parameters()}


def run_experts(rank: int, world_size: int, jobs: Sequence[tuple[str, str, int, Case]]) -> list[dict[str, Tensor]]:
    """Per (experts implementation, dispatcher, tp_size, case) what this rank finds; ranks of a group share a batch."""
    results = []
    for implementation, name, tp_size, case in jobs:
        experts = dispatched(implementation, name, tp_size, case.hidden_states[0].dtype)
        results.append(forward_backward(experts, [tensors[rank // tp_size] for tensors in case]))
    return results


def expected_of(implementation: str, case: Case) -> dict[str, Any]:
    """The same on one process: lists by rank for inputs and outputs, whole tensors for parameters."""
    experts = build_experts(implementation, case.hidden_states[0].dtype)
    found = forward_backward(experts, [torch.cat(tensors) for tensors in case])
    sizes = [len(hidden) for hidden in case.hidden_states]
    return {
        name: list(tensor.split(sizes)) if name in ("output", "hidden_states", "top_k_weights") else tensor
        for name, tensor in found.items()
    }


def numeric_gradients(rank: int, world_size: int, sizes: Sequence[int]) -> dict[str, float]:
    """Per dispatcher, the largest error of the analytic gradients of all ranks' inputs against finite differences, in float64."""
    return {name: _worst_gradient(rank, world_size, name, build_case(sizes)) for name in BOTH}


def _worst_gradient(rank: int, world_size: int, name: str, case: Case) -> float:
    experts = dispatched("batched_mm", name, 1)
    found = forward_backward(experts, [tensors[rank] for tensors in case])
    slope = torch.linspace(-1, 2, WIDTH, dtype=torch.float64)

    def loss() -> float:
        output = experts(*[tensors[rank] for tensors in case]).detach()
        total = (output * slope).sum() + (output**2).sum()
        distributed.all_reduce(total)
        return float(total)

    worst = 0.0
    for owner in range(world_size):  # every rank takes part in every evaluation
        for tensors, gradient in ((case.hidden_states, "hidden_states"), (case.top_k_weights, "top_k_weights")):
            values = tensors[owner].view(-1)
            for i in range(0, values.numel(), 3):
                kept, step = values[i].item(), 1e-5
                values[i] = kept + step
                above = loss()
                values[i] = kept - step
                slope_i = (above - loss()) / (2 * step)
                values[i] = kept
                if owner == rank:
                    worst = max(worst, abs(slope_i - float(found[gradient].view(-1)[i])))
    return worst


def die_at(rank: int, world_size: int, what: str) -> None:
    """Rank 2 kills itself on entering an exchange, which its peers have begun or will begin."""
    from hf_moe_ext.dcca import exchange

    case = build_case([5, 4, 3, 6])
    experts = dispatched("batched_mm", "latent_all_to_all", 1)
    if rank == 2:
        start = exchange.Exchange.__init__

        def begin(self: Any, *args: Any) -> None:
            if args[-1] == what:
                os.kill(os.getpid(), signal.SIGKILL)
            start(self, *args)

        exchange.Exchange.__init__ = begin
    forward_backward(experts, [tensors[rank] for tensors in case])
    raise AssertionError("nobody failed")


# Whole models


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered if it is distributed."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def batches() -> list[dict[str, Tensor]]:
    """Four batches of different lengths."""
    return [zoo.random_batch(batch=2, length=length, seed=length) for length in (9, 5, 12, 7)]


def train_step(model: Any, index: int = 0, size: int = 1) -> dict[str, Any]:
    """Logits of this process's share of the batches, and all gradients of one step over all of them."""
    mine = batches()[index::size]
    step_tokens = torch.stack([batch["labels"][:, 1:].ne(-100).sum() for batch in batches()]).sum()
    model.train()
    logits = []
    for batch in mine:
        output = model(**batch, num_items_in_batch=step_tokens)
        (output.loss * size).backward()  # the mean over processes is taken with the gradients
        logits.append(whole(output.logits))
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return {"logits": logits, "gradients": gradients}


def train_models(
    rank: int, world_size: int, folder: Path, implementation: str, dtype: torch.dtype, layouts: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One step per layout; also logits without gradients, where another path may run."""
    # What the stock lm_head does under tensor parallelism inside FSDP; nothing writes into that view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    results = []
    for layout in layouts:
        model = load(folder, layout, implementation, dtype)
        config = model.config.distributed_config
        divide_expert_gradients_once(model, config)  # stock models do not
        index, size = rank // config.tp_size, config.dp_size
        found = train_step(model, index, size)
        with torch.no_grad():
            mine = batches()[index::size]
            found["inference"] = [whole(model.eval()(**batch).logits) for batch in mine]
        results.append(found)
    return results
