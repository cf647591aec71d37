"""Counts of layers against the paper's tables, to the last printed digit, and against counting by hand."""

import pytest

from hf_moe_ext.scaling import layer_counts

XL = {"hidden_size": 2048, "latent_size": 512}
LAYERS, EXPERTS, TOP_K, VOCAB, PADDED_VOCAB, SEQUENCES, LENGTH = 24, 64, 8, 50_257, 50_304, 256, 2048


def test_paper_parameters():
    standard, dcca = (
        layer_counts.paper_parameters(block, **XL, num_experts=EXPERTS, num_layers=LAYERS, vocab_size=VOCAB)
        for block in ("standard", "dcca")
    )
    assert (standard, dcca, dcca - standard) == (3_728_906_240, 3_779_237_888, 50_331_648)
    assert (f"{standard / 1e9:.2f}", f"{dcca / 1e9:.2f}", f"{dcca / standard - 1:.2%}") == ("3.73", "3.78", "1.35%")
    medium = [
        layer_counts.paper_parameters(block, 1024, 256, num_experts=EXPERTS, num_layers=LAYERS, vocab_size=VOCAB)
        for block in ("standard", "dcca")
    ]
    assert medium == [958_483_456, 971_066_368]


def test_paper_flops():
    def flops(block, vocab_size):
        return layer_counts.paper_iteration_flops(
            block, **XL, top_k=TOP_K, num_layers=LAYERS, vocab_size=vocab_size, num_sequences=SEQUENCES,
            sequence_length=LENGTH,
        )  # fmt: skip

    standard, dcca = flops("standard", PADDED_VOCAB), flops("dcca", PADDED_VOCAB)
    assert (standard, dcca) == (3_490_674_540_281_856, 3_649_004_214_681_600)
    assert (f"{standard / 1e12:,.2f}", f"{dcca / 1e12:,.2f}") == ("3,490.67", "3,649.00")
    assert f"{dcca / standard - 1:.2%}" == "4.54%"
    assert f"{flops('standard', VOCAB) / 1e12:,.2f}" == "3,490.37"


def test_layer_parameters():
    standard = layer_counts.layer_parameters("standard", 2048, EXPERTS, 512)
    dcca = layer_counts.layer_parameters("dcca", 2048, EXPERTS, 2048, 512)
    assert standard == layer_counts.LayerParameters(134_217_728, 0, 131_072)
    assert dcca == layer_counts.LayerParameters(134_217_728, 2_097_152, 131_072)
    assert dcca.projections / dcca.experts == 0.015625
    gated = {f: layer_counts.layer_parameters("dcca", 2048, EXPERTS, f, 512, gated=True) for f in (1344, 1365, 1408)}
    assert [gated[f].experts for f in gated] == [132_120_576, 134_184_960, 138_412_032]
    assert gated[1344].experts + gated[1344].projections == standard.experts
    vanilla = layer_counts.layer_parameters("standard", 2048, 4, 4 * 2048)
    assert vanilla.experts == standard.experts
    with pytest.raises(ValueError, match='latent_size is needed for block="dcca"'):
        layer_counts.layer_parameters("dcca", 2048, 64, 512)


def test_mended_model_counts_what_a_model_has():
    """A model of these shapes, counted tensor by tensor."""
    hidden, latent, experts, layers, vocab = 12, 3, 4, 5, 7
    attention = [(hidden, hidden), (hidden,)] * 4 + [(hidden,)] * 4
    cdac = [(hidden, latent), (latent,), (latent, hidden), (hidden,)] * experts
    dcca = [(latent, hidden), (hidden,), (hidden, latent), (latent,)] * experts + [(hidden, latent)] * 2
    outside = [(vocab, hidden), (hidden,), (hidden,)]

    def count(shapes):
        return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)

    for block, tensors in (("standard", cdac), ("dcca", dcca)):
        whole = layers * count([*attention, (experts, hidden), *tensors]) + count(outside)
        assert layer_counts.model_parameters(block, hidden, latent, experts, layers, vocab) == whole


def test_token_flops():
    standard = layer_counts.token_flops("standard", 2048, EXPERTS, TOP_K, 512, LENGTH)
    dcca = layer_counts.token_flops("dcca", 2048, EXPERTS, TOP_K, 2048, LENGTH, 512)
    assert standard.experts == dcca.experts == 2 * 2 * 8 * 2048 * 512
    assert dcca.projections / dcca.experts == 1 / TOP_K
    assert standard.projections == 0
    # Three forward passes, without the router, and the head: the printed iteration.
    for block, one in (("standard", standard), ("dcca", dcca)):
        tokens = SEQUENCES * LENGTH
        whole = 3 * tokens * (LAYERS * (one.total - one.router) + 2 * VOCAB * 2048)
        assert whole == layer_counts.paper_iteration_flops(
            block, **XL, top_k=TOP_K, num_layers=LAYERS, vocab_size=VOCAB, num_sequences=SEQUENCES,
            sequence_length=LENGTH,
        )  # fmt: skip
