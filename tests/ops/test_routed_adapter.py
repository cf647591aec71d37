"""The dense-masked, the grouped and the gathered path against the loop, on awkward sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_moe_ext.ops.routed_adapter import choose_path, routed_adapter
from support import naive

SCALES = {"lora": 1.7, "parallel": 1.0}


def _case(tokens, num_experts, top_k, rank, hidden=8, dtype=torch.float64, sentinels=False):
    """Adapters, routing and an output direction; expert 1 is never chosen, ids repeat within a row now and then."""
    generator = torch.Generator().manual_seed(tokens * 100 + num_experts * 10 + top_k)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    index = torch.randint(0, num_experts, (tokens, top_k), generator=generator)
    if num_experts > 2:
        index[index == 1] = 2
    if sentinels:
        index[0] = num_experts
        index[-1, -1] = num_experts + 3
        index[tokens // 2, 0] = -1
    leaves = (
        normal(tokens, hidden),
        normal(num_experts, rank, hidden),
        normal(num_experts, hidden, rank),
        normal(tokens, top_k),
    )
    return leaves, index, torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)


def _compare(leaves, index, direction, kind, path, atol):
    hidden, A, B, weights = leaves
    activation = F.silu if kind == "parallel" else None
    ours = routed_adapter(hidden, A, B, index, weights, scale=SCALES[kind], activation=activation, path=path)
    theirs = naive.routed_adapter(hidden, index, weights, A, B, scale=SCALES[kind], kind=kind)
    torch.testing.assert_close(ours.double(), theirs, atol=atol, rtol=0)
    ours_grad = torch.autograd.grad((ours * direction).sum(), leaves)
    # A case of sentinels alone leaves the adapters out of the loop's graph: their gradient is zero.
    theirs_grad = torch.autograd.grad((theirs * direction.double()).sum(), leaves, materialize_grads=True)
    for name, one, other in zip(("hidden", "A", "B", "weights"), ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("sentinels", [False, True])
@pytest.mark.parametrize("kind", ["lora", "parallel"])
@pytest.mark.parametrize("path", ["dense", "grouped", "gathered"])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "rank"), [(1, 1, 1, 1), (1, 4, 2, 3), (9, 4, 1, 4), (9, 4, 4, 2), (13, 6, 3, 5)]
)
def test_every_path_equals_the_loop(tokens, num_experts, top_k, rank, path, kind, sentinels):
    _compare(*_case(tokens, num_experts, top_k, rank, sentinels=sentinels), kind, path, atol=1e-10)


@pytest.mark.parametrize("sentinels", [False, True])
@pytest.mark.parametrize("kind", ["lora", "parallel"])
@pytest.mark.parametrize("num_experts", [3, 40])  # 40 are many for 1 or 4 tokens, and gathered is chosen
@pytest.mark.parametrize("tokens", [1, 4, 5, 9])  # up to rank, the dense path has a second form
def test_without_gradients_it_equals_the_loop(tokens, num_experts, kind, sentinels):
    (hidden, A, B, weights), index, _ = _case(tokens, num_experts, 2, 4, sentinels=sentinels)
    activation = F.silu if kind == "parallel" else None
    theirs = naive.routed_adapter(hidden, index, weights, A, B, scale=SCALES[kind], kind=kind)
    everyone = naive.routed_adapter(hidden, None, None, A, B, scale=SCALES[kind], kind=kind)
    with torch.no_grad():
        ours = routed_adapter(hidden, A, B, index, weights, scale=SCALES[kind], activation=activation)
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
        ours = routed_adapter(hidden, A, B, scale=SCALES[kind], activation=activation)
        torch.testing.assert_close(ours, everyone, atol=1e-10, rtol=0)


def test_the_gathered_path_casts_adapters_to_the_dtype_of_its_input():
    (hidden, A, B, weights), index, _ = _case(2, 40, 2, 4)
    with torch.no_grad():
        ours = routed_adapter(hidden.bfloat16(), A, B, index, weights)
    theirs = naive.routed_adapter(hidden, index, weights, A, B, scale=1.0, kind="lora")
    assert ours.dtype == torch.bfloat16
    # Eight bits of mantissa through two products: a few percent of the largest value.
    assert (ours.double() - theirs).abs().max() < 0.05 * theirs.abs().max()


@pytest.mark.parametrize("hidden", [16, 18])
@pytest.mark.parametrize("rank", [1, 3, 4, 16])
@pytest.mark.parametrize("kind", ["lora", "parallel"])
def test_the_grouped_kernel_equals_the_loop_in_float32(kind, rank, hidden):
    # float32 sums of up to 18*3 products of order 10: 1e-4 is a few hundred roundings at that size.
    case = _case(13, 6, 3, rank, hidden=hidden, dtype=torch.float32, sentinels=True)
    _compare(*case, kind, "grouped", atol=1e-4)


@pytest.mark.parametrize("width", [16, 18])
def test_the_grouped_kernel_runs_in_bfloat16_with_sizes_it_cannot_align(width):
    (hidden, A, B, weights), index, _ = _case(13, 6, 3, 5, hidden=width, sentinels=True)
    ours = routed_adapter(*(t.bfloat16() for t in (hidden, A, B)), index, weights.bfloat16(), path="grouped")
    theirs = naive.routed_adapter(hidden, index, weights, A, B, scale=1.0, kind="lora")
    # Eight bits of mantissa through two products: a few percent of the largest value.
    assert (ours.double() - theirs).abs().max() < 0.05 * theirs.abs().max()


@pytest.mark.parametrize("path", ["dense", "grouped"])
def test_no_path_reads_a_value_on_the_host(path):
    """Fake tensors have no values: `.item()`, `.tolist()` and shapes that depend on data raise on them."""
    dtype = torch.bfloat16  # torch's fake grouped_mm knows no other
    with FakeTensorMode():
        hidden, A, B = (torch.empty(*size, dtype=dtype) for size in ((13, 18), (6, 5, 18), (6, 18, 5)))
        leaves = [t.requires_grad_() for t in (hidden, A, B, torch.empty(13, 3, dtype=dtype))]
        out = routed_adapter(*leaves[:3], torch.empty(13, 3, dtype=torch.long), leaves[3], path=path)
        gradients = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == hidden.shape
    assert [g.shape for g in gradients] == [t.shape for t in leaves]


@pytest.mark.parametrize("kind", ["lora", "parallel"])
def test_without_an_index_every_adapter_serves_every_token(kind):
    (hidden, A, B, _), _, direction = _case(7, 3, 1, 4)
    activation = F.silu if kind == "parallel" else None
    ours = routed_adapter(hidden, A, B, scale=SCALES[kind], activation=activation)
    theirs = naive.routed_adapter(hidden, None, None, A, B, scale=SCALES[kind], kind=kind)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    ours_grad = torch.autograd.grad((ours * direction).sum(), (hidden, A, B))
    theirs_grad = torch.autograd.grad((theirs * direction).sum(), (hidden, A, B))
    for one, other in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_several_adapters_are_one_of_their_joint_rank():
    """Identity (iii): D(M, r) equals S(M*r) at the same scale."""
    (hidden, A, B, _), _, _ = _case(7, 3, 1, 4)
    joint = routed_adapter(hidden, A.reshape(1, 12, 8), B.transpose(1, 2).reshape(1, 12, 8).transpose(1, 2), scale=1.7)
    torch.testing.assert_close(routed_adapter(hidden, A, B, scale=1.7), joint, atol=1e-10, rtol=0)


@pytest.mark.parametrize("path", ["dense", "grouped"])
@pytest.mark.parametrize("kind", ["lora", "parallel"])
def test_dropout_keeps_the_mean(kind, path):
    (hidden, A, B, weights), index, _ = _case(5, 3, 2, 4)
    # Linear in the dropped value only for LoRA; the parallel adapter drops before its activation, so it needs relu(x)=x.
    activation = torch.nn.Identity() if kind == "parallel" else None

    def run(p):
        return routed_adapter(hidden, A, B, index, weights, activation=activation, dropout=p, path=path)

    mean = torch.stack([run(0.3).detach() for _ in range(4000)]).mean(0)
    assert not torch.equal(run(0.3), run(0.3))
    # Standard error of 4000 draws of a value whose spread is about its own size, times four.
    assert (mean - run(0.0)).abs().max() < 4 * run(0.0).abs().max() / 4000**0.5


@pytest.mark.parametrize("missing", ["index", "weights"])
def test_index_and_weights_come_together(missing):
    (hidden, A, B, weights), index, _ = _case(3, 2, 1, 2)
    given = {"index": index, "weights": weights} | {missing: None}
    with pytest.raises(ValueError, match="index and weights come together"):
        routed_adapter(hidden, A, B, **given)


@pytest.mark.parametrize(
    ("num_experts", "rank", "top_k", "dtype", "path"),
    [
        (8, 16, 2, torch.float32, "dense"),
        (64, 4, 8, torch.float32, "dense"),
        (128, 12, 8, torch.float32, "dense"),
        (128, 13, 8, torch.float32, "grouped"),
        (256, 16, 8, torch.bfloat16, "dense"),
        (256, 17, 8, torch.bfloat16, "grouped"),
        (256, 64, 8, torch.float64, "dense"),
    ],
)
def test_the_choice_of_path(num_experts, rank, top_k, dtype, path):
    assert choose_path(num_experts, rank, top_k, dtype) == path


@pytest.mark.parametrize("path", ["dense", "grouped", "gathered"])
@pytest.mark.parametrize("kind", ["lora", "parallel"])
def test_one_shared_A_equals_equal_ones(kind, path):
    (hidden, A, B, weights), index, _ = _case(7, 5, 2, 4, sentinels=True)
    activation = F.silu if kind == "parallel" else None
    one = A[:1].detach().requires_grad_()
    ours = routed_adapter(hidden, one, B, index, weights, scale=SCALES[kind], activation=activation, path=path)
    repeated = one.detach().repeat(5, 1, 1).requires_grad_()
    theirs = naive.routed_adapter(hidden, index, weights, repeated, B, scale=SCALES[kind], kind=kind)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    direction = torch.randn_like(ours)
    ours_grad = torch.autograd.grad((ours * direction).sum(), (hidden, one, B, weights))
    theirs_grad = torch.autograd.grad((theirs * direction).sum(), (hidden, repeated, B, weights))
    for mine, other in zip(ours_grad, theirs_grad, strict=True):
        other = other.sum(dim=0, keepdim=True) if other.shape == repeated.shape else other
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)
