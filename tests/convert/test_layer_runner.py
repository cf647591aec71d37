"""Layer by layer is the whole model."""

import math

import pytest
import torch

from hf_moe_ext import MixtralExtConfig, OlmoeExtConfig
from hf_moe_ext.convert.distillation import measure_perplexity
from hf_moe_ext.convert.layer_runner import LayerRunner
from support import zoo


@pytest.mark.parametrize(("family", "kind"), [("olmoe", OlmoeExtConfig), ("mixtral", MixtralExtConfig)])
def test_layers_in_turn_equal_the_model(family: str, kind: type) -> None:
    model = zoo.build(family, num_hidden_layers=3)
    settings = model.config.to_dict()
    settings.pop("model_type")
    runner = LayerRunner(kind(**settings), "standard", torch.device("cpu"))
    ids = torch.randint(3, zoo.VOCAB_SIZE, (11, 20))  # more rows than one batch of the runner
    hidden = model.model.embed_tokens(ids).detach()
    outputs = model(input_ids=ids, output_hidden_states=True)
    for layer in range(3):
        runner.load(model.model.layers[layer].state_dict(), layer)
        record = runner.run(hidden)
        hidden = record.hidden_states
        if layer < 2:  # the last of the model's list has the last norm behind it
            torch.testing.assert_close(hidden, outputs.hidden_states[layer + 1], rtol=0, atol=1e-5)
        _, weights, chosen = model.model.layers[layer].mlp.gate(record.block_inputs)
        torch.testing.assert_close(record.weights, weights)
        assert torch.equal(record.ids, chosen)
        block = model.model.layers[layer].mlp(record.block_inputs.view(11, 20, -1)).flatten(0, 1)
        torch.testing.assert_close(record.block_outputs, block, rtol=0, atol=1e-5)
    found = runner.perplexity(hidden, ids, model.model.norm.weight, model.lm_head.weight)
    assert found == pytest.approx(math.exp(model(input_ids=ids, labels=ids).loss.item()), rel=1e-5)
    assert measure_perplexity(model, ids, batch_rows=3) == pytest.approx(found, rel=1e-5)


def test_wrong_weights_are_refused_by_name() -> None:
    model = zoo.build("olmoe")
    settings = model.config.to_dict()
    settings.pop("model_type")
    runner = LayerRunner(OlmoeExtConfig(**settings), "standard", torch.device("cpu"))
    state = model.model.layers[0].state_dict() | {"self_attn.q_proj.bias": torch.zeros(32)}
    with pytest.raises(ValueError, match=r"layer 7 .* does not fit its config\.json: [\s\S]*q_proj\.bias"):
        runner.load(state, 7)
