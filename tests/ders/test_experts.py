"""Shared base plus deltas: both forwards against the loop, on awkward sizes and routings."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_moe_ext.ders import forward
from hf_moe_ext.ders.experts import DersExperts
from hf_moe_ext.ders.forward import choose_path, fused, materialised
from hf_moe_ext.ops.delta_quantization import quantize
from support.naive_ders import low_rank_matrices, shared_base_experts, sparse_matrices

HIDDEN, INNER, EXPERTS = 6, 5, 4
FORMS = {
    "low_rank": {"delta": "low_rank", "rank": 2},
    "sparse": {"delta": "sparse", "drop_rate": 0.7, "seed": 3, "layer": 2},
    "quantized": {"delta": "quantized", "bits": 4, "group_size": 4},
}
PATHS = {
    "low_rank": {"materialised": None, "dense": "dense", "grouped": "grouped"},
    "sparse": {"materialised": None, "grouped": "grouped"},
    "quantized": {"materialised": None, "grouped": "grouped"},
}
EVERY_PATH = [(form, path) for form, paths in PATHS.items() for path in paths]
# tokens, top_k, routing: "idle" leaves expert 1 out, "sentinels" has ids outside, "nobody" has no others.
CASES = [(1, 1, "any"), (1, 4, "any"), (7, 2, "idle"), (9, 4, "any"), (8, 3, "sentinels"), (5, 2, "nobody")]


def make_experts(form="low_rank", gated=True, bias=True, dtype=torch.float64, **more) -> DersExperts:
    """Experts whose base, deltas and biases are all of the same size."""
    settings = {"hidden_dim": HIDDEN, "intermediate_dim": INNER, "num_experts": EXPERTS, **FORMS[form], **more}
    module = DersExperts(act="silu" if gated else F.gelu, gated=gated, bias=bias, **settings).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    if form == "quantized":
        for matrix in module.matrices:
            for expert in range(module.num_experts):
                set_codes(module, matrix, expert, 0.5 * torch.randn(module.matrix_shape(matrix)))
    return module


@torch.no_grad()
def set_codes(module: DersExperts, matrix: str, expert: int, delta: Tensor) -> None:
    code = quantize(delta, module.bits, module.group_size)
    for part, tensor in code.tensors().items():
        getattr(module, f"delta_{matrix}_{part}")[expert] = tensor


def route(tokens: int, top_k: int, routing: str = "any", experts: int = EXPERTS) -> tuple[Tensor, Tensor]:
    """Distinct ids of each token and gates that do not sum to 1."""
    index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    if routing == "idle":
        index = torch.stack([torch.tensor([0, 2, 3])[torch.randperm(3)[:top_k]] for _ in range(tokens)])
    if routing == "sentinels":
        index[0], index[2, 1], index[-1, 0] = experts, experts + 3, -1
    if routing == "nobody":
        index[:] = experts
    return index, 0.1 + torch.rand(tokens, top_k, dtype=torch.float64)


def run(module: DersExperts, path: str, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    if path == "materialised":
        return materialised(hidden, index, weights, module.experts())
    return fused(hidden, index, weights, module.experts(), path=path)


def naive(module: DersExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The loop on the module's own parameters, read by their names on disk."""
    stored = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    inner = module.intermediate_dim
    base, biases, deltas = {"down": stored["down_proj"]}, {}, {}
    if module.gated:
        base["gate"], base["up"] = stored["gate_up_proj"][:inner], stored["gate_up_proj"][inner:]
    else:
        base["up"] = stored["up_proj"]
    if module.gated and module.has_bias:
        both = stored["gate_up_proj_bias"]
        biases = {"gate": both[:, :inner], "up": both[:, inner:], "down": stored["down_proj_bias"]}
    elif module.has_bias:
        biases = {"up": stored["up_proj_bias"], "down": stored["down_proj_bias"]}
    for matrix in base:
        if module.delta == "low_rank":
            deltas[matrix] = low_rank_matrices(stored[f"delta_{matrix}_A"], stored[f"delta_{matrix}_B"])
            continue
        codes = [module.deltas(matrix).delta(i) for i in range(module.num_experts)]
        deltas[matrix] = [code.decode() for code in codes]
        if module.delta == "sparse":
            places = [code.indices.positions().tolist() for code in codes]
            deltas[matrix] = sparse_matrices(stored[f"delta_{matrix}_values"], places, module.matrix_shape(matrix))
    return shared_base_experts(hidden, index, weights, base, deltas, biases, module.act_fn)


def gradients(module: DersExperts, output: Tensor, hidden: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Of the input, the gates and every parameter, for one fixed direction; 0 for what is not in the graph."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = {"hidden": hidden, "weights": weights, **dict(module.named_parameters())}
    found = torch.autograd.grad((output * direction).sum(), list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def assert_same(found: dict, expected: dict, atol: float) -> None:
    for name, gradient in found.items():
        wanted = torch.zeros_like(gradient) if expected[name] is None else expected[name]
        torch.testing.assert_close(gradient, wanted, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# --- equality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "top_k", "routing"), CASES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("form", "path"), EVERY_PATH)
def test_every_path_equals_the_loop_with_all_gradients(form, path, gated, bias, tokens, top_k, routing):
    module = make_experts(form, gated, bias)
    hidden = torch.randn(tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    index, weights = route(tokens, top_k, routing)
    weights.requires_grad_()
    output, expected = (
        f(module, *a) for f, a in ((run, (path, hidden, index, weights)), (naive, (hidden, index, weights)))
    )
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    found = gradients(module, output, hidden, weights)
    assert None not in found.values()
    assert_same(found, gradients(module, expected, hidden, weights), atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_paths_agree_to_1e_12_in_float64_and_1e_5_in_float32(form):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        torch.manual_seed(1)
        module = make_experts(form, dtype=dtype, hidden_dim=24, intermediate_dim=20)
        hidden = (torch.randn(30, 24, dtype=dtype) / 5).requires_grad_()
        index, weights = route(30, 2, "sentinels")
        weights = weights.to(dtype).requires_grad_()
        outputs = {path: run(module, path, hidden, index, weights) for path in PATHS[form]}
        found = {path: gradients(module, output, hidden, weights) for path, output in outputs.items()}
        for path, output in outputs.items():
            scale = outputs["materialised"].abs().max()
            assert (output - outputs["materialised"]).abs().max() <= bound * scale, path
            for name, gradient in found[path].items():
                wanted = found["materialised"][name]
                assert (gradient - wanted).abs().max() <= bound * wanted.abs().max(), (path, name)


@pytest.mark.parametrize("path", ["dense", "grouped"])
def test_low_rank_gradcheck(path):
    module = make_experts(hidden_dim=3, intermediate_dim=2, num_experts=2, rank=1)
    index, weights = route(3, 2, experts=2)
    index[0, 0] = 2
    hidden = torch.randn(3, 3, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weights)] + list(module.parameters())
    assert torch.autograd.gradcheck(lambda *_: run(module, path, hidden, index, weights), leaves)


@pytest.mark.parametrize("form", ["sparse", "quantized"])
def test_decoded_gradcheck(form):
    module = make_experts(form, hidden_dim=3, intermediate_dim=2, num_experts=2)
    index, weights = route(3, 2, experts=2)
    hidden = torch.randn(3, 3, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weights)] + list(module.parameters())
    assert torch.autograd.gradcheck(lambda *_: run(module, "grouped", hidden, index, weights), leaves)


@pytest.mark.parametrize("path", ["materialised", "dense", "grouped"])
def test_half_precision_sums_in_float32(path):
    module = make_experts(dtype=torch.bfloat16, hidden_dim=32, intermediate_dim=48, num_experts=8)
    index, weights = route(20, 8, experts=8)
    hidden = torch.randn(20, 32, dtype=torch.bfloat16)
    output = run(module, path, hidden, index, weights.to(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    expected = naive(module.double(), hidden, index, weights.to(torch.bfloat16))
    # Roundings of 2^-9 in a few products of standard deviation about 1; a bfloat16 sum of 8 experts would double it.
    assert (output.double() - expected).norm() < 2**-7 * expected.norm()


# --- gradients of section 3.9 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "path"), EVERY_PATH)
def test_an_idle_expert_has_zeros_not_none(form, path):
    module = make_experts(form)
    index, weights = route(9, 2, "idle")
    run(module, path, torch.randn(9, HIDDEN, dtype=torch.float64), index, weights).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        if name not in ("gate_up_proj", "down_proj"):
            assert not parameter.grad[1].any(), name
            assert parameter.grad[0].any(), name


def dense_gradients(module: DersExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> dict[str, list[Tensor]]:
    """dL/dW_i of every expert's whole matrices, from the loop, for the direction of ``gradients``."""
    deltas = {
        m: [module.deltas(m).delta(i).decode().detach().requires_grad_() for i in range(module.num_experts)]
        for m in module.matrices
    }
    inner = module.intermediate_dim
    base = {"gate": module.gate_up_proj[:inner], "up": module.gate_up_proj[inner:], "down": module.down_proj}
    output = shared_base_experts(hidden, index, weights, base, deltas, {}, module.act_fn)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (output * direction).sum().backward()
    return {m: [each.grad for each in deltas[m]] for m in deltas}


def test_gradient_identities_of_sparse_values_and_of_the_base():
    module = make_experts("sparse", bias=False)
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    index, weights = route(9, 2)
    weights.requires_grad_()
    G = dense_gradients(module, hidden, index, weights)
    found = gradients(module, run(module, "grouped", hidden, index, weights), hidden, weights)
    for matrix in module.matrices:
        for i, G_i in enumerate(G[matrix]):
            places = module.deltas(matrix).delta(i).indices.positions()
            gathered = G_i.reshape(-1)[places]
            torch.testing.assert_close(found[f"delta_{matrix}_values"][i], gathered, atol=1e-12, rtol=0)
    torch.testing.assert_close(found["gate_up_proj"], torch.cat([sum(G["gate"]), sum(G["up"])]), atol=1e-12, rtol=0)
    torch.testing.assert_close(found["down_proj"], sum(G["down"]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("path", ["dense", "grouped"])
def test_gradient_identities_of_low_rank_factors(path):
    module = make_experts(bias=False)
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    index, weights = route(9, 2)
    weights.requires_grad_()
    G = dense_gradients(module, hidden, index, weights)
    found = gradients(module, run(module, path, hidden, index, weights), hidden, weights)
    for matrix in module.matrices:
        A, B = getattr(module, f"delta_{matrix}_A"), getattr(module, f"delta_{matrix}_B")
        for i, G_i in enumerate(G[matrix]):
            torch.testing.assert_close(found[f"delta_{matrix}_A"][i], B[i].T @ G_i, atol=1e-12, rtol=0)
            torch.testing.assert_close(found[f"delta_{matrix}_B"][i], G_i @ A[i].T, atol=1e-12, rtol=0)


# --- at birth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward_path", ["fused", "materialised"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_new_layer_is_its_dense_ffn(form, gated, forward_path):
    settings = {"num_experts": EXPERTS, "gated": gated, **FORMS[form]}
    module = DersExperts(HIDDEN, INNER, act="silu", forward_path=forward_path, **settings).double()
    x = torch.randn(9, HIDDEN, dtype=torch.float64)
    index, weights = route(9, 2)
    first = F.linear(x, getattr(module, module.first_name))
    inner = F.silu(first[:, :INNER]) * first[:, INNER:] if gated else F.silu(first)
    dense = F.linear(inner, module.down_proj)
    # Gates of sum 1 give the dense FFN, others their sum times it.
    normalised = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(module(x, index, normalised), dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(module(x, index, weights), weights.sum(-1, keepdim=True) * dense, atol=1e-12, rtol=0)


def test_at_birth_A_has_no_gradient_and_B_has():
    module = DersExperts(HIDDEN, INNER, EXPERTS, rank=2)
    index, weights = route(40, 2)
    module(torch.randn(40, HIDDEN), index, weights.float()).sum().backward()
    for matrix in module.matrices:
        assert not getattr(module, f"delta_{matrix}_A").grad.any()
        assert getattr(module, f"delta_{matrix}_B").grad.flatten(1).any(dim=1).all()
        assert getattr(module, f"delta_{matrix}_A").abs().max() <= module.matrix_shape(matrix)[1] ** -0.5


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("form", "path"), EVERY_PATH)
def test_only_the_materialised_path_keeps_matrices_of_experts(form, path, gated):
    module = make_experts(form, gated, dtype=torch.float32, hidden_dim=32, intermediate_dim=48)
    index, weights = route(6, 2)
    own = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() >= 32 * 48 and tensor.untyped_storage().data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run(module, path, torch.randn(6, 32, requires_grad=True), index, weights.float())
    assert output.requires_grad
    # Two matrices a used expert or three: gate and up are one there.
    assert (len(kept) >= 2 * len(index.unique())) if path == "materialised" else not kept, kept


def test_held_positions_change_nothing_and_are_not_saved():
    module = make_experts("sparse")
    index, weights = route(9, 2)
    x = torch.randn(9, HIDDEN, dtype=torch.float64)
    expected, names = module(x, index, weights), list(module.state_dict())
    module.hold_positions = True
    assert torch.equal(module(x, index, weights), expected)
    assert torch.equal(module(x, index, weights), expected)
    assert list(module.state_dict()) == names
    # A checkpoint of another seed brings its own positions.
    other = make_experts("sparse", seed=99)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x, index, weights), other(x, index, weights))


# --- the module ------------------------------------------------------------------------------------------------------

BASE = {"gate_up_proj": (10, 6), "down_proj": (6, 5)}
BIASES = {"gate_up_proj_bias": (4, 10), "down_proj_bias": (4, 6)}
GOLDEN = {
    "low_rank": {
        **{"delta_gate_A": (4, 2, 6), "delta_gate_B": (4, 5, 2), "delta_up_A": (4, 2, 6), "delta_up_B": (4, 5, 2)},
        **{"delta_down_A": (4, 2, 5), "delta_down_B": (4, 6, 2)},
    },
    "sparse": {
        f"delta_{matrix}_{part}": (4, size)
        for matrix in ("gate", "up", "down")
        for part, size in (("values", 9), ("stream", 4))
    },
    "quantized": {
        **{"delta_gate_codes": (4, 5, 3), "delta_gate_scales": (4, 5, 2)},
        **{"delta_up_codes": (4, 5, 3), "delta_up_scales": (4, 5, 2)},
        **{"delta_down_codes": (4, 6, 3), "delta_down_scales": (4, 6, 2)},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_names_on_disk(form):
    found = {name: tuple(tensor.shape) for name, tensor in make_experts(form).state_dict().items()}
    assert found == {**BASE, **BIASES, **GOLDEN[form]}
    ungated = make_experts(form, gated=False, bias=False).state_dict()
    golden = {name: shape for name, shape in GOLDEN[form].items() if "gate" not in name}
    expected = {"up_proj": (5, 6), "down_proj": (6, 5), **golden}
    assert {name: tuple(tensor.shape) for name, tensor in ungated.items()} == expected


def test_positions_of_every_mask_differ_and_come_back_from_the_file():
    module = make_experts("sparse", hidden_dim=12, intermediate_dim=12)
    again = make_experts("sparse", hidden_dim=12, intermediate_dim=12, seed=1, layer=0)
    again.load_state_dict(module.state_dict())
    places = [
        tuple(again.deltas(m).delta(i).indices.positions().tolist()) for m in again.matrices for i in range(EXPERTS)
    ]
    assert len(set(places)) == len(places)
    assert again.deltas("up").delta(3).indices == module.deltas("up").delta(3).indices
    other_layer = make_experts("sparse", hidden_dim=12, intermediate_dim=12, layer=5)
    assert tuple(other_layer.deltas("gate").delta(0).indices.positions().tolist()) not in places


@pytest.mark.parametrize(("base", "deltas"), [(True, True), (False, True), (True, False)])
def test_base_and_deltas_train_where_switched_on(base, deltas):
    module = make_experts(train_base=base, train_deltas=deltas)
    index, weights = route(9, 2)
    module(torch.randn(9, HIDDEN, dtype=torch.float64), index, weights).sum().backward()
    for name, parameter in module.named_parameters():
        trained = base if name in ("gate_up_proj", "down_proj") else deltas
        assert (parameter.grad is not None) == trained, name


@pytest.mark.parametrize("forward_path", ["fused", "materialised"])
@pytest.mark.parametrize("form", FORMS)
def test_activation_checkpointing_changes_nothing(form, forward_path):
    module = make_experts(form, forward_path=forward_path)
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    index, weights = route(9, 2)
    weights.requires_grad_()
    plain = module(hidden, index, weights)
    again = checkpoint(module, hidden, index, weights, use_reentrant=False)
    assert torch.equal(again, plain)
    assert_same(gradients(module, again, hidden, weights), gradients(module, plain, hidden, weights), atol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_low_rank_compiles_in_one_graph(gated, bias):
    module = make_experts(gated=gated, bias=bias)
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    index, weights = route(9, 2, "sentinels")
    weights.requires_grad_()
    plain, compiled = module(hidden, index, weights), torch.compile(module, backend="aot_eager", fullgraph=True)
    output = compiled(hidden, index, weights)
    torch.testing.assert_close(output, plain, atol=1e-12, rtol=0)
    assert_same(gradients(module, output, hidden, weights), gradients(module, plain, hidden, weights), atol=1e-12)


@pytest.mark.parametrize(
    ("form", "forward_path"),
    [("sparse", "fused"), ("quantized", "fused"), ("low_rank", "materialised"), ("sparse", "materialised")],
)
def test_other_forms_compile(form, forward_path):
    module = make_experts(form, forward_path=forward_path)
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    index, weights = route(9, 2)
    output = torch.compile(module, backend="aot_eager")(hidden, index, weights)
    torch.testing.assert_close(output, module(hidden, index, weights), atol=1e-12, rtol=0)


@pytest.mark.parametrize("forward_path", ["fused", "materialised"])
@pytest.mark.parametrize("form", FORMS)
def test_autocast_computes_in_half_precision_and_returns_the_input_dtype(form, forward_path):
    module = make_experts(form, dtype=torch.float32, forward_path=forward_path)
    index, weights = route(9, 2)
    x = torch.randn(9, HIDDEN)
    expected = module(x, index, weights.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x, index, weights.float())
        output.sum().backward()
    assert output.dtype == torch.float32
    difference = (output - expected).norm() / expected.norm()
    assert 0 < difference < 2**-5
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


def test_dense_serves_few_bottlenecks_and_what_the_grouped_kernel_cannot():
    assert choose_path(8, 4, torch.float32) == "dense"
    limit = forward.DENSE_LIMIT
    assert choose_path(limit + 1, 1, torch.float32) == "grouped"
    assert choose_path(limit + 1, 1, torch.float64) == "dense"


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank": 6}, ValueError, "rank must be at least 1 and at most 5"),
        ({"rank": None}, ValueError, "delta='low_rank' needs rank, got None"),
        ({"drop_rate": 0.5}, ValueError, "delta='low_rank' has no drop_rate, got drop_rate=0.5"),
        ({"delta": "sparse", "rank": None, "drop_rate": 1.0}, ValueError, "drop_rate"),
        ({"delta": "quantized", "rank": None, "bits": 3}, ValueError, "bits must be one of 16, 8, 4, 2, 1, got 3"),
        ({"delta": "lora"}, ValueError, "delta must be one of low_rank, sparse, quantized, got 'lora'"),
        ({"act": "sillu"}, ValueError, "act must be a name of Transformers' activations"),
        ({"forward_path": "fast"}, ValueError, "forward_path must be 'fused' or 'materialised', got 'fast'"),
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"hidden_dim": 6.0}, TypeError, "hidden_dim must be an int, got 6.0"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    good = {"hidden_dim": HIDDEN, "intermediate_dim": INNER, "num_experts": EXPERTS, "rank": 2}
    with pytest.raises(error, match=message):
        DersExperts(**{**good, **settings})


def test_the_dense_path_is_refused_without_low_rank_deltas():
    module = make_experts("sparse")
    index, weights = route(3, 1)
    with pytest.raises(ValueError, match="path 'dense' is for low-rank deltas only"):
        run(module, "dense", torch.randn(3, HIDDEN, dtype=torch.float64), index, weights)
