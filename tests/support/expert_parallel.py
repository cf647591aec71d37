"""What the ranks of ``tests/models/test_expert_parallel.py`` run, and the same on one process.

The comparison is of a sum that weighs every logit by a number of its own: the stock loss rounds logits to float32.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.distributed import expert_parallel
from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm, OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, Qwen3MoeTopKRouter
from transformers.utils import logging as logging_of_transformers

from support import distributed_models, distributed_training, latent_models, zoo
from support.distributed_models import Layout

TOP_K, NUM_STEPS = 2, 5
_NORMS = OlmoeRMSNorm | MixtralRMSNorm | Qwen3MoeRMSNorm
_ROUTERS = OlmoeTopKRouter | MixtralTopKRouter | Qwen3MoeTopKRouter
# Which experts a token can choose; None: all. With four of eight, half of the experts get no row; with the first four, so
# does the second half of the ranks.
ROUTINGS: dict[str, list[int] | None] = {"spread": None, "empty_experts": [0, 1, 4, 5], "empty_ranks": [0, 1, 2, 3]}


def make_config(family: str, block: str, **changes: Any) -> Any:
    """A tiny configuration; beside ``latent_models.BLOCKS`` there is "full_gated", a mixed list with everything on."""
    if block == "full_gated":
        block, changes = "full", {"moe_expert_gated": True, "moe_block": ["dcca", "standard"], **changes}
    return latent_models.make_config(family, block, **{"num_experts_per_tok": TOP_K, **changes})


def save(folder: Path, family: str, block: str, routing: str = "spread", **changes: Any) -> Path:
    """A model of random weights in float64, in a folder of its own below ``folder``."""
    path = folder / f"{family}-{block}-{routing}"
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(make_config(family, block, **changes))
            zoo.spread_routers(model)
            for weight in zoo.routers(model):
                _close_experts(weight, ROUTINGS[routing])
        model.to(torch.float64).save_pretrained(path)
    return path


def _close_experts(weight: Tensor, open_experts: list[int] | None) -> None:
    """Leave tokens only the given experts: they come in pairs of opposite rows, so that half of them is above zero."""
    if open_experts is None:
        return
    with torch.no_grad():
        half = len(open_experts) // 2
        assert half == TOP_K
        rows = weight[open_experts[:half]].clone()
        weight.zero_()
        weight[open_experts[:half]], weight[open_experts[half:]] = rows, -rows


def load(
    folder: Path, layout: Layout | None = None, experts: str = "batched_mm", dtype: torch.dtype = torch.float64
) -> Any:
    """The model of a folder; without a layout, whole on this process. In float64 nothing in it is float32."""
    model = distributed_models.load(folder, layout, experts, dtype)
    return keep_float64(model) if dtype == torch.float64 else model


def keep_float64(model: nn.Module) -> Any:
    """Stock norms and routers compute in float32, which cuts a rounding difference of 1e-17 to steps of 1e-8."""
    for module in model.modules():
        if isinstance(module, _NORMS | _ROUTERS):
            assert "forward" not in vars(module), "a plan has a rule for it, which this would undo"
        if isinstance(module, _NORMS):
            module.forward = MethodType(_norm, module)
        elif isinstance(module, _ROUTERS):
            module.forward = MethodType(_route, module)
    return model


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _route(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = nn.functional.linear(hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight)
    weights, index = logits.softmax(-1).topk(self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights, index


def batches() -> list[Tensor]:
    """Token ids of one step, [rows, length]; the third is a single token."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(1, 5), (2, 9), (1, 1), (3, 4)]
    return [torch.randint(3, zoo.VOCAB_SIZE, shape, generator=generator) for shape in shapes]


def coefficients(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What each logit of a batch counts in the sum that is differentiated."""
    generator = torch.Generator().manual_seed(int(ids.sum()))
    values = torch.randn(*ids.shape, zoo.VOCAB_SIZE, dtype=torch.float64, generator=generator)
    return (values / values.numel() ** 0.5).to(dtype)


def own_batches(model: Any, rank: int) -> dict[int, Tensor]:
    """This rank's share of the batches, by number; ranks of one tensor-parallel group have the same."""
    config = getattr(model.config, "distributed_config", None)
    size, index = (config.dp_size, rank // config.tp_size) if config is not None else (1, 0)
    return dict(list(enumerate(batches()))[index::size])


def infer(model: Any, rank: int = 0) -> dict[int, Tensor]:
    """Logits of this rank's batches, without gradients."""
    with torch.no_grad():
        return {number: model(input_ids=ids).logits for number, ids in own_batches(model, rank).items()}


def train(model: Any, rank: int = 0) -> tuple[dict[int, Tensor], dict[str, Tensor | None]]:
    """Logits of this rank's batches, and all gradients of the sum over all batches."""
    config = getattr(model.config, "distributed_config", None)
    model.train()
    model.zero_grad()
    found = {}
    for number, ids in own_batches(model, rank).items():
        logits = model(input_ids=ids).logits
        # FSDP averages over the ranks that hold different batches.
        total = (logits * coefficients(ids, logits.dtype)).sum() * (config.dp_size if config is not None else 1)
        total.backward()
        found[number] = logits.detach()
    return found, gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Whole gradients by parameter, None for a parameter without one. All ranks call it together."""
    return {name: None if p.grad is None else whole(p.grad) for name, p in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor of what may be spread over the ranks."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


@contextmanager
def recorded_dispatch() -> Iterator[dict[str, Any]]:
    """Shapes of the rows that each dispatcher was called with, by name of its class, and of what was exchanged."""
    calls: dict[str, list[tuple[int, ...]]] = {}
    sent: list[tuple[int, ...]] = []
    classes = set(EPImplementationInterface().values())
    originals = {cls: cls.__dict__["__call__"] for cls in classes if "__call__" in cls.__dict__}
    exchange = expert_parallel.all_to_all_single_autograd

    def spy(original: Any) -> Any:
        def call(self: Any, hidden_states: Tensor, *arguments: Tensor) -> Tensor:
            calls.setdefault(type(self).__name__, []).append(tuple(hidden_states.shape))
            return original(self, hidden_states, *arguments)

        return call

    def spy_exchange(tensor: Tensor, *arguments: Any) -> Tensor:
        sent.append(tuple(tensor.shape))
        return exchange(tensor, *arguments)

    try:
        for cls, original in originals.items():
            cls.__call__ = spy(original)
        expert_parallel.all_to_all_single_autograd = spy_exchange
        yield {"calls": calls, "sent": sent}
    finally:
        for cls, original in originals.items():
            cls.__call__ = original
        expert_parallel.all_to_all_single_autograd = exchange


class _Messages(logging.Handler):
    """What Transformers logs as a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


# What the ranks run: functions at the top level, called with (rank, world_size, ...).


def steps(
    rank: int, world_size: int, cases: Sequence[tuple[Path, Layout, str]], dtype: torch.dtype = torch.float64
) -> list[Any]:
    """Logits and gradients per case (folder, layout, experts implementation), what was dispatched and what was logged."""
    logging_of_transformers.disable_progress_bar()
    # What the stock lm_head does under tensor parallelism inside FSDP; nothing writes into that view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    messages = _Messages()
    logging.getLogger("transformers").addHandler(messages)
    results = []
    for folder, layout, experts in cases:
        model = load(folder, layout, experts, dtype)
        tokens = [ids.numel() for ids in own_batches(model, rank).values()]
        with recorded_dispatch() as inferring:
            inference = infer(model, rank)
        with recorded_dispatch() as training:
            logits, found = train(model, rank)
        results.append(
            {
                "inference": inference,
                "logits": logits,
                "gradients": found,
                "inferring": inferring,
                "training": training,
                "tokens": tokens,
                "messages": messages.texts[:],
            }
        )
        messages.texts.clear()
    return results


def train_and_save(rank: int, world_size: int, folder: Path, out: Path, layout: Layout) -> Any:
    """A plain Trainer on all of the model's weights; the model is saved below ``out``."""
    model = load(folder, layout)
    trainer = distributed_training.make_trainer(model, out, max_steps=NUM_STEPS, learning_rate=0.003)
    trainer.train()
    trainer.save_model(str(out / "saved"))
    return trajectory(trainer), {name: whole(p) for name, p in model.named_parameters()}


def trajectory(trainer: Any) -> list[dict[str, float]]:
    """Loss and norm of the gradients of every step."""
    return [{key: log[key] for key in ("loss", "grad_norm")} for log in trainer.state.log_history if "loss" in log]


def generate(rank: int, world_size: int, folder: Path, layouts: Sequence[Layout]) -> list[Any]:
    """Tokens that this rank generates after its own prompts, per layout, and the dispatchers called."""
    results = []
    for layout in layouts:
        model = load(folder, layout).eval()
        with recorded_dispatch() as record:
            results.append(
                ({n: continuation(model, ids) for n, ids in own_batches(model, rank).items()}, record["calls"])
            )
    return results


def continuation(model: Any, ids: Tensor) -> Tensor:
    """Greedy tokens, with a cache; ranks stop at different lengths."""
    settings = {"max_new_tokens": 4 + ids.shape[1] % 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
