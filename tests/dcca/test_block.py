"""The DCCA block against the definition written out with loops, its limits, and its scales at birth."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock, OlmoeTopKRouter

from hf_moe_ext.dcca.block import DccaMoeBlock
from hf_moe_ext.dcca.initialization import activation_rms, combined_weight_norm, initial_scales
from support.latent_models import LatentBlock, latent_moe_block, make_config, make_model

DCCA_BLOCKS = ["ungated", "gated", "full"]


class Router64(nn.Module):
    """The stock router with its softmax in float64; the stock one rounds to float32 whatever the model's dtype."""

    def __init__(self, config):
        super().__init__()
        self.top_k, self.normalize = config.num_experts_per_tok, getattr(config, "norm_topk_prob", True)
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size, dtype=torch.float64))

    def forward(self, hidden: Tensor):
        logits = hidden @ self.weight.T
        weights, index = torch.softmax(logits, dim=-1).topk(self.top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True) if self.normalize else weights, index


def make_block(block="ungated", router=Router64, implementation="batched_mm", dtype=torch.float64, **overrides):
    config = make_config("olmoe_ext", block, **overrides)
    config._experts_implementation = implementation
    module = DccaMoeBlock(config, router(config)).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module, config


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("block", DCCA_BLOCKS)
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_definition(block, implementation, tokens, normalize):
    module, config = make_block(block, implementation=implementation, norm_topk_prob=normalize)
    x = torch.randn(1, tokens, config.hidden_size, dtype=torch.float64, requires_grad=True)
    target = torch.randn(tokens, config.hidden_size, dtype=torch.float64)
    ours = module(x)[0]
    theirs = latent_moe_block(x[0], LatentBlock.read(module, config))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    wrt = [x, *module.parameters()]
    for mine, naive, name in zip(
        torch.autograd.grad((ours * target).sum(), wrt),
        torch.autograd.grad((theirs * target).sum(), wrt),
        ["x", *dict(module.named_parameters())],
        strict=True,
    ):
        assert float(naive.abs().max()) > 0, name
        torch.testing.assert_close(mine, naive, atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_grouped_mm_equals_eager_in_float32():
    module, config = make_block("gated", router=OlmoeTopKRouter, dtype=torch.float32)
    x = torch.randn(2, 9, config.hidden_size)
    outputs = {}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        module.experts.config._experts_implementation = implementation
        outputs[implementation] = module(x)
    for implementation, output in outputs.items():
        torch.testing.assert_close(output, outputs["eager"], atol=1e-6, rtol=0, msg=lambda m, i=implementation: i + m)


def test_eager_leaves_out_experts_of_other_ranks():
    module, config = make_block("ungated", implementation="eager")
    z = torch.randn(4, config.moe_latent_size, dtype=torch.float64)
    index = torch.tensor([[0, 8], [8, 8], [3, 9], [7, 2]])  # 8 and more: not here
    weights = torch.rand(4, 2, dtype=torch.float64)
    here = index < config.num_experts
    expected = module.experts(z, index.clamp(max=7), weights * here)
    torch.testing.assert_close(module.experts(z, index, weights), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("block", ["ungated", "gated"])
def test_combining_then_ascending_equals_ascending_then_combining(block):
    module, config = make_block(block)
    x = torch.randn(6, config.hidden_size, dtype=torch.float64)
    twin = LatentBlock.read(module, config)
    torch.testing.assert_close(module(x[None])[0], latent_moe_block(x, twin, ascend_first=True), atol=1e-10, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_full_width_with_identity_projections_is_the_standard_block_exactly(implementation):
    config = make_config(
        "olmoe_ext", "gated", moe_latent_size=32, moe_expert_intermediate_size=48, router_aux_loss_coef=0.0
    )
    config._experts_implementation = implementation
    stock = OlmoeSparseMoeBlock(config)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = DccaMoeBlock(config, stock.gate)
    ours.experts.load_state_dict(stock.experts.state_dict())
    with torch.no_grad():
        ours.descend.weight.copy_(torch.eye(32))
        ours.ascend.weight.copy_(torch.eye(32))
    x = torch.randn(2, 9, 32)
    assert torch.equal(ours(x), stock(x))


def test_the_router_reads_the_full_width():
    module, config = make_block("ungated")
    seen = []
    module.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    x = torch.randn(1, 5, config.hidden_size, dtype=torch.float64)
    module(x)
    with torch.no_grad():
        module.descend.weight.add_(torch.randn_like(module.descend.weight))
    module(x)
    (z, index, weights), (other_z, other_index, other_weights) = seen
    assert torch.equal(index, other_index)
    assert torch.equal(weights, other_weights)
    assert z.shape == other_z.shape == (5, config.moe_latent_size)
    assert not torch.equal(z, other_z)


def test_jitter_of_mixtral_reaches_router_and_experts_only_in_training():
    model = make_model("mixtral_ext", "ungated", router_jitter_noise=0.5)
    block = model.model.layers[0].mlp
    x = torch.randn(1, 5, 32)
    before = x.clone()
    assert torch.equal(block(x), block(x))
    block.train()
    assert not torch.allclose(block(x), block(x))
    assert torch.equal(x, before)  # the stock block changes its input in place


# --- scales at birth -------------------------------------------------------------------------------------------------


def test_moments():
    assert activation_rms(torch.nn.functional.relu, 3.0) == pytest.approx(3.0 / 2**0.5, rel=1e-6)
    a = 0.7 * torch.randn(2_000_000, dtype=torch.float64)
    assert activation_rms(torch.nn.functional.silu, 0.7) == pytest.approx(
        float((torch.nn.functional.silu(a) ** 2).mean().sqrt()), rel=5e-3
    )
    assert combined_weight_norm(4, 4, 1e-9, normalized=True) == pytest.approx(0.5)  # four equal weights
    assert combined_weight_norm(8, 2, 1e-9, normalized=False) == pytest.approx((2 / 64) ** 0.5)
    state = torch.random.get_rng_state()
    combined_weight_norm(8, 3, 0.5, normalized=False)
    assert torch.equal(state, torch.random.get_rng_state())


WIDE = {
    "hidden_size": 512,
    "intermediate_size": 384,
    "moe_latent_size": 128,
    "moe_expert_intermediate_size": None,
    "num_hidden_layers": 1,
    "initializer_range": 0.02,
    "num_experts": 16,
}


def scales_of(block: nn.Module, x: Tensor) -> tuple[float, float]:
    """RMS of the output, and of the gradient of the input for a random output gradient of RMS 1."""
    x = x.clone().requires_grad_()
    output = block(x)
    (gradient,) = torch.autograd.grad(output, x, torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    return float(output.detach().pow(2).mean().sqrt()), float(gradient.pow(2).mean().sqrt())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("initializer_range", [0.02, 0.05])
@pytest.mark.parametrize(
    ("settings", "gradient_ratio"),
    [
        ({"moe_expert_gated": True}, (0.93, 1.07)),
        ({"moe_expert_gated": True, "moe_latent_norm": True}, (0.7, 1.07)),
        ({}, (0.65, 1.0)),  # a product of two factors is steeper than one activation of the same size
        ({"moe_expert_act": "relu"}, (0.65, 1.0)),
        ({"moe_latent_norm": True}, (0.65, 1.0)),
    ],
)
def test_output_and_gradient_start_at_the_standard_scale(settings, gradient_ratio, initializer_range, normalize):
    wide = {**WIDE, "initializer_range": initializer_range, "norm_topk_prob": normalize}
    standard = make_model("olmoe_ext", "standard", **{k: v for k, v in wide.items() if not k.startswith("moe_")})
    latent = make_model("olmoe_ext", "ungated", **wide, **settings)
    x = torch.randn(4, 128, 512)
    (standard_output, standard_gradient), (output, gradient) = (
        scales_of(model.model.layers[0].mlp, x) for model in (standard, latent)
    )
    assert output / standard_output == pytest.approx(1.0, abs=0.07)
    low, high = gradient_ratio
    assert low < gradient / standard_gradient < high


def test_scales_of_a_gated_expert_of_the_same_width_are_the_stock_ones():
    scales = initial_scales(
        hidden_size=64,
        intermediate_size=48,
        act=torch.nn.functional.silu,
        latent_size=64,
        expert_intermediate_size=48,
        expert_act=torch.nn.functional.silu,
        gated=True,
        initializer_range=0.02,
    )
    assert scales.up == pytest.approx(0.02)
    assert scales.down == pytest.approx(0.02)
    assert scales.descend == scales.ascend == 1 / 8
