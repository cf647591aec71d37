"""What conversions compare: numbers that depend on the weights alone, not on where in memory they lie."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from hf_moe_ext.convert.logit_check import load_plain
from support.latent_models import make_model


def test_weights_are_aligned_wherever_the_file_has_them(tmp_path: Path) -> None:
    model = make_model("mixtral_ext", "standard", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for extra in range(0, 64, 8):  # the header's length moves every tensor of the file
        save_file(tensors, path, metadata={"format": "pt", "extra": "x" * extra})
        again = load_plain(tmp_path)
        assert {tensor.data_ptr() % 64 for tensor in (*again.parameters(), *again.buffers())} == {0}
    assert again.lm_head.weight is again.model.embed_tokens.weight
