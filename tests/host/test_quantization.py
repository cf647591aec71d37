"""Which expert weights a quantiser left as they were, and how many bytes they are."""

import pytest
import torch
from torch import nn

from hf_moe_ext.host.quantization import (
    expert_weights,
    is_quantised,
    quantises_linear_only,
    quantization_method,
    stored_bytes,
    unquantised_experts,
)
from support import zoo


def quantised(model, method="bitsandbytes"):
    """The model as Transformers leaves one that it has quantised."""
    model.hf_quantizer = object()
    model.config.quantization_config = {"quant_method": method}
    return model


def packed(*shape, dtype=torch.uint8):
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_all_expert_weights_of_every_family_are_read(family):
    model = zoo.build(family, dtype=torch.bfloat16)
    expected = {
        id(parameter): parameter
        for name, parameter in model.named_parameters()
        if ".experts." in name and parameter.ndim == 3 and not name.endswith("bias")
    }
    found = {id(tensor): tensor for _, _, tensor in expert_weights(model)}
    assert found.keys() == expected.keys()
    assert unquantised_experts(model) is None, "nothing was quantised, so nothing is missing"
    left = unquantised_experts(quantised(model))
    assert left is not None
    assert sum(left.tensors.values()) == len(expected)
    assert left.expert_bytes == sum(2 * parameter.numel() for parameter in expected.values())
    stored = [*model.parameters(), *model.buffers()]
    assert left.model_bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    assert left.share == left.expert_bytes / left.model_bytes


def test_the_words_name_count_shape_and_dtype():
    left = unquantised_experts(quantised(zoo.build("olmoe", dtype=torch.bfloat16)))
    assert left
    assert left.method == "bitsandbytes"
    assert left.describe_tensors() == "2 x gate_up_proj [8, 96, 32] bfloat16, 2 x down_proj [8, 32, 48] bfloat16"


def test_packed_experts_with_their_scales_and_biases_are_quantised():
    """The layouts of MXFP4 (gpt_oss) and of block FP8."""
    model = quantised(zoo.build("olmoe", dtype=torch.bfloat16))
    for block, dtype in zip(model.model.layers, (torch.uint8, torch.float8_e4m3fn), strict=True):
        experts = block.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            shape = getattr(experts, name).shape
            setattr(experts, name, packed(*shape, dtype=dtype))
            setattr(experts, f"{name}_scale_inv", nn.Parameter(torch.ones(shape[0], 1, 1)))
            setattr(experts, f"{name}_bias", nn.Parameter(torch.ones(shape[:2], dtype=torch.bfloat16)))
    assert unquantised_experts(model) is None
    # One tensor of one block left behind is found among the packed ones.
    experts.down_proj = nn.Parameter(torch.zeros(8, 32, 48, dtype=torch.bfloat16))
    left = unquantised_experts(model)
    assert left
    assert left.tensors == {("down_proj", (8, 32, 48), torch.bfloat16): 1}
    assert left.expert_bytes == 8 * 32 * 48 * 2


class InPackedForm(torch.Tensor):
    """A tensor that looks like float32 and stores int8 with a scale, as torchao's and quanto's do."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data, scale):
        self.data_inside, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["data_inside", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


def test_a_tensor_subclass_counts_as_what_it_stores():
    tensor = InPackedForm(torch.zeros(8, 4, dtype=torch.int8), torch.ones(8))
    assert tensor.dtype == torch.float32
    assert is_quantised(tensor)
    assert stored_bytes(tensor) == 32 + 32
    assert not is_quantised(torch.zeros(2, dtype=torch.float16))


def test_an_outline_is_not_a_quantised_model():
    """A model on the meta device has the configuration of the checkpoint, but nothing of it is quantised."""
    config = zoo.FAMILIES["olmoe"](quantization_config={"quant_method": "bitsandbytes"})
    with torch.device("meta"):
        model = type(zoo.build("olmoe"))(config)
    assert quantization_method(model.config) == "bitsandbytes"
    assert unquantised_experts(model) is None


@pytest.mark.parametrize(
    ("settings", "method", "linear_only"),
    [
        (None, None, False),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", True),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, "torchao", True),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "FqnToConfig"}}}, "torchao", False),
        ({"quant_method": "mxfp4"}, "mxfp4", False),
        ({"bits": 4}, "unnamed method", False),
    ],
)
def test_what_a_configuration_says(settings, method, linear_only):
    config = zoo.FAMILIES["olmoe"](**({} if settings is None else {"quantization_config": settings}))
    assert quantization_method(config) == method
    assert quantises_linear_only(config) is linear_only
