"""Coordinate check: train the same model at several widths for a few steps and see what grows with the width.

Under µP no activation's change does (arXiv 2203.03466, appendix D.1); for a Mixture of Experts the router's logits, their
gradients and its largest probability are looked at too, because features alone do not tell a router that saturates with the
width (arXiv 2508.09752).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from hf_moe_ext.mup.coord_input import check_arguments, check_device, check_tokens, draw_tokens, prepare_config
from hf_moe_ext.mup.coord_probe import Probe, Snapshot, rms
from hf_moe_ext.mup.coord_verdict import DELTA, Finding, Row, Size, fit_rows, judge
from hf_moe_ext.mup.groups import param_groups
from hf_moe_ext.mup.roles import MUP, find_config
from hf_moe_ext.mup.widening import widen

BETAS, EPS = (0.9, 0.95), 1e-12  # an epsilon that never matters, so that the groups' own is not what is checked
WIDTHS, NUM_STEPS, LEARNING_RATE = (64, 128, 256, 512), 6, 4e-3
NUM_SEQUENCES, SEQUENCE_LENGTH = 8, 64

ModelInit = Callable[[Any], nn.Module]


@dataclass(frozen=True)
class Settings:
    """What was run.

    Attributes:
        model_type: of the configuration.
        mup: parametrisation of the configuration.
        mup_form: its form.
        moe_blocks: block of each layer.
        widths: hidden sizes.
        num_steps: optimizer steps.
        seeds: that weights were drawn with.
        lr: learning rate at the base width.
        num_sequences: rows of the batch.
        sequence_length: tokens of a row.
        hold_latent: whether a DCCA block's latent kept its size.
        device: where it was computed.
    """

    model_type: str
    mup: str
    mup_form: str
    moe_blocks: tuple[str, ...]
    widths: tuple[int, ...]
    num_steps: int
    seeds: tuple[int, ...]
    lr: float
    num_sequences: int
    sequence_length: int
    hold_latent: bool
    device: str


@dataclass(frozen=True)
class CoordCheck:
    """The result.

    Attributes:
        settings: what was run.
        rows: every quantity's slope and sizes.
        findings: what is asked of the rows.
        notes: what the check could not look at.
    """

    settings: Settings
    rows: list[Row]
    findings: list[Finding]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything asked holds."""
        return all(finding.ok for finding in self.findings)

    def slope(self, quantity: str, step: int, layer: int | None = None) -> float:
        """Slope of one row; KeyError if there is none."""
        for row in self.rows:
            if (row.quantity, row.layer, row.step) == (quantity, layer, step):
                return row.slope
        raise KeyError(f"no row of {quantity!r}, layer {layer}, step {step}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.ok,
            "settings": asdict(self.settings),
            "notes": list(self.notes),
            "findings": [
                {"quantity": f.row.quantity, "layer": f.row.layer, "step": f.row.step, "slope": f.row.slope}
                | {"low": f.low, "high": f.high, "ok": f.ok}
                for f in self.findings
            ],
            "rows": [asdict(row) for row in self.rows],
        }


def check_coordinates(
    config: Any,
    widths: Sequence[int] = WIDTHS,
    *,
    num_steps: int = NUM_STEPS,
    seeds: Sequence[int] = (0, 1),
    lr: float = LEARNING_RATE,
    tokens: Tensor | None = None,
    num_sequences: int = NUM_SEQUENCES,
    sequence_length: int = SEQUENCE_LENGTH,
    hold_latent: bool = False,
    device: str | torch.device = "cpu",
    model_init: ModelInit | None = None,
    after_model: Callable[[int, int], None] | None = None,
) -> CoordCheck:
    """Train a configuration at several widths for a few steps on one fixed batch, and fit how sizes grow with the width.

    Each width starts from fresh weights in float32 and takes AdamW steps on ``param_groups`` (betas 0.9 and 0.95, epsilon
    1e-12, no weight decay, no clipping, the language model's loss alone).

    Args:
        config: an ``*_ext`` configuration at any width; ``widen`` makes the others from it. A stock Mixtral or OLMoE
            configuration is measured as its ``*_ext`` form with default keys, in standard parametrisation.
        widths: hidden sizes, at least two.
        num_steps: optimizer steps; the bars are asked after 1, 3 and 6.
        seeds: for the weights.
        lr: learning rate at the base width; large, so that what was drawn at random fades quickly.
        tokens: the batch, ids [rows, length]; None: ``draw_tokens``, the same for all.
        num_sequences: rows of a drawn batch.
        sequence_length: tokens of a row of a drawn batch.
        hold_latent: keep a DCCA block's latent at its size while the width grows.
        device: where to train; the weights are always drawn on the CPU.
        model_init: builds the model of a widened configuration, for other initial weights; None: as the model draws them.
        after_model: called with width and seed after each model.

    Raises:
        ValueError: a configuration that cannot be checked or widened, or a value outside its range.
        TypeError: a value of the wrong kind.
    """
    config, notes = prepare_config(config)
    check_arguments(config, widths, num_steps, seeds, lr, hold_latent)
    check_device(device)
    tokens = draw_tokens(config.vocab_size, num_sequences, sequence_length) if tokens is None else tokens
    check_tokens(tokens, config.vocab_size)
    # All of them first: a width that cannot be is refused before any is trained.
    configs = [widen(config, width, hold_latent=hold_latent) for width in widths]
    sizes: list[Size] = []
    for seed in seeds:
        for widened in configs:
            sizes += measure(widened, tokens, num_steps, lr, seed, device, model_init)
            if after_model is not None:
                after_model(widened.hidden_size, seed)
    rows = fit_rows(sizes)
    settings = Settings(
        *(config.model_type, config.mup, config.mup_form, tuple(config.moe_blocks), tuple(widths), num_steps),
        *(tuple(seeds), lr, *tokens.shape, hold_latent, str(device)),
    )
    return CoordCheck(settings, rows, judge(rows, router_start=config.mup == MUP), notes)


def measure(
    config: Any,
    tokens: Tensor,
    num_steps: int,
    lr: float,
    seed: int,
    device: str | torch.device = "cpu",
    model_init: ModelInit | None = None,
) -> list[Size]:
    """Train one model and write down its sizes before each step and after the last; arguments as ``check_coordinates``."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had been drawn
        torch.manual_seed(seed)
        model: Any = (model_init or _build_model)(config)
    built = find_config(model).hidden_size
    if built != config.hidden_size:
        raise ValueError(
            f"model_init: must build the model of the configuration it is given (hidden_size={config.hidden_size}); got one "
            f"of hidden_size={built}"
        )
    # Dropout and router jitter would be part of every change that is measured.
    model.to(device).eval()
    tokens = tokens.to(device)
    optimizer = AdamW(param_groups(model, lr, weight_decay=0.0, eps=EPS), lr=lr, betas=BETAS, fused=True)
    sizes, start = [], None
    with Probe(model) as probe:
        for step in range(num_steps + 1):
            snapshot = probe.observe(tokens)
            start = snapshot if start is None else start
            for (quantity, layer), value in _read_numbers(snapshot, start).items():
                sizes.append(Size(quantity, layer, step, config.hidden_size, seed, value))
            if step < num_steps:
                optimizer.step()
                optimizer.zero_grad()
    return sizes


def _read_numbers(snapshot: Snapshot, start: Snapshot) -> dict[tuple[str, int | None], float]:
    """Sizes of the features, of their changes since the start, and what the probe counts itself."""
    sizes: dict[tuple[str, int | None], float] = {key: rms(tensor) for key, tensor in snapshot.features.items()}
    if snapshot is not start:
        for (quantity, layer), tensor in snapshot.features.items():
            sizes[DELTA + quantity, layer] = rms(tensor - start.features[quantity, layer])
    return {("loss", None): snapshot.loss, **sizes, **snapshot.numbers}


def _build_model(config: Any) -> nn.Module:
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
