"""Closed forms against the numbers that the specification prints."""

from hf_moe_ext.scaling.activation_formulas import gpt_layer_bytes, moe_block_token_bytes


def test_dense_layer():
    assert gpt_layer_bytes(1, 2048, 4096, 32) == 956_301_312
    assert gpt_layer_bytes(1, 2048, 4096, 32, flash=True) == 285_212_672


def test_moe_block():
    assert moe_block_token_bytes(2048, 64, 8, 1024) == 119_040
    # The imbalance touches what is routed, and nothing else.
    more = moe_block_token_bytes(2048, 64, 8, 1024, shared_size=512, imbalance=1.5)
    assert more - moe_block_token_bytes(2048, 64, 8, 1024, shared_size=512) == 0.5 * (119_040 - 4096 - 256)
