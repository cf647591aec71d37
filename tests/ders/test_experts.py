"""The module: names on disk, birth, positions, what trains, bad settings."""

import pytest
import torch
import torch.nn.functional as F

from hf_moe_ext.ders.experts import DersExperts
from support.ders_experts import (
    EXPERTS,
    FORMS,
    HIDDEN,
    INNER,
    MORE_FORMS,
    PLAIN_FORMS,
    make_experts,
    route,
)


@pytest.mark.parametrize("forward_path", ["fused", "materialised"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", PLAIN_FORMS)
def test_a_new_layer_is_its_dense_ffn(form, gated, forward_path):
    settings = {"num_experts": EXPERTS, "gated": gated, **PLAIN_FORMS[form]}
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
    "low_rank_each": {
        **{"delta_gate_A": (4, 1, 6), "delta_gate_B": (4, 5, 1), "delta_up_A": (4, 3, 6), "delta_up_B": (4, 5, 3)},
        **{"delta_down_A": (4, 2, 5), "delta_down_B": (4, 6, 2)},
    },
    "sparse_bits": {
        f"delta_{matrix}_{part}": (4, size)
        for matrix in ("gate", "up", "down")
        for part, size in (("codes", 8), ("scales", 4), ("stream", 4))
    },
    "stored": {
        f"delta_{matrix}_{part}": (4, 9) for matrix in ("gate", "up", "down") for part in ("values", "positions")
    },
    "stored_bits_each": {
        **{"delta_gate_codes": (4, 2), "delta_gate_scales": (4, 4), "delta_gate_positions": (4, 15)},
        **{"delta_up_codes": (4, 9), "delta_up_scales": (4, 3), "delta_up_positions": (4, 9)},
        **{"delta_down_codes": (4, 3), "delta_down_positions": (4, 3)},
    },
}


@pytest.mark.parametrize("form", GOLDEN)
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


@pytest.mark.parametrize("form", MORE_FORMS)
def test_a_new_layer_of_every_other_form_is_its_dense_ffn(form):
    module = DersExperts(HIDDEN, INNER, EXPERTS, **MORE_FORMS[form]).double()
    x, (index, weights) = torch.randn(9, HIDDEN, dtype=torch.float64), route(9, 2)
    gate, up = F.linear(x, module.gate_up_proj).split(INNER, dim=1)
    dense = weights.sum(-1, keepdim=True) * F.linear(F.silu(gate) * up, module.down_proj)
    torch.testing.assert_close(module(x, index, weights), dense, atol=1e-12, rtol=0)


def test_new_stored_positions_are_the_seeds_in_order():
    stored = DersExperts(HIDDEN, INNER, EXPERTS, **MORE_FORMS["stored"], seed=5, layer=1)
    seeded = DersExperts(HIDDEN, INNER, EXPERTS, delta="sparse", drop_rate=0.7, seed=5, layer=1)
    for matrix in stored.matrices:
        positions = getattr(stored, f"delta_{matrix}_positions")
        assert positions.dtype == torch.int32
        for i in range(EXPERTS):
            wanted = seeded.deltas(matrix).delta(i).indices.positions().sort().values
            assert positions[i].tolist() == wanted.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_built_without_memory_it_has_the_same_names_and_shapes(form):
    with torch.device("meta"):
        found = DersExperts(HIDDEN, INNER, EXPERTS, bias=True, **FORMS[form]).state_dict()
    expected = make_experts(form, dtype=torch.float32).state_dict()
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items() if not n.endswith("scales")
    } | {n: (t.shape, torch.bfloat16) for n, t in expected.items() if n.endswith("scales")}
    assert all(tensor.is_meta for tensor in found.values())


@pytest.mark.parametrize(("base", "deltas"), [(True, True), (False, True), (True, False)])
def test_base_and_deltas_train_where_switched_on(base, deltas):
    module = make_experts(train_base=base, train_deltas=deltas)
    index, weights = route(9, 2)
    module(torch.randn(9, HIDDEN, dtype=torch.float64), index, weights).sum().backward()
    for name, parameter in module.named_parameters():
        trained = base if name in ("gate_up_proj", "down_proj") else deltas
        assert (parameter.grad is not None) == trained, name


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank": 6}, ValueError, "rank must be at least 1 and at most 5"),
        ({"rank": None}, ValueError, "delta='low_rank' needs rank, got None"),
        ({"drop_rate": 0.5}, ValueError, "delta='low_rank' has no drop_rate, got drop_rate=0.5"),
        ({"delta": "sparse", "rank": None, "drop_rate": 1.0}, ValueError, "drop_rate"),
        ({"delta": "quantized", "rank": None, "bits": 3}, ValueError, "bits must be one of 16, 8, 4, 2, 1, got 3"),
        ({"delta": "lora"}, ValueError, "delta must be one of low_rank, sparse, quantized, got 'lora'"),
        (
            {"rank": {"gate": 2, "up": 2}},
            ValueError,
            "rank must be one number, or a mapping with one for each of gate, up",
        ),
        ({"rank": {"gate": 2, "up": 2, "down": None}}, ValueError, "rank must be one number, or a mapping"),
        ({"rank": {"gate": 2, "up": 2, "down": 6}}, ValueError, "rank must be at least 1 and at most 5"),
        ({"rank": {"up": 2, "down": 2, "gate": 2}, "gated": False}, ValueError, "with one for each of up, down"),
        ({"bits": 4}, ValueError, "delta='low_rank' has no bits, got bits=4; leave it out"),
        (
            {"delta": "sparse", "rank": None, "drop_rate": 0.5, "bits": 3},
            ValueError,
            "bits must be one of 16, 8, 4, 2, 1",
        ),
        ({"delta": "sparse", "rank": None, "bits": 4}, ValueError, "delta='sparse' needs drop_rate, got None"),
        ({"stored_positions": True}, ValueError, "stored_positions is for delta='sparse', got delta='low_rank'"),
        (
            {"delta": "sparse", "rank": None, "drop_rate": 0.5, "stored_positions": True, "hold_positions": True},
            ValueError,
            "hold_positions is for positions of a seed",
        ),
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
