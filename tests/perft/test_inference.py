"""Adapters under generation: caches, compilation, continuous batching, assistants, padding, several in one batch."""

import pytest
import torch
from peft import get_peft_model
from torch._dynamo.utils import counters
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

from hf_moe_ext import PerftConfig
from support import zoo

VARIANTS = ("R", "E", "D", "S")
GREEDY = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
# Logits here are below 3 in float32; two ways to sum a few hundred such terms differ by some 10 roundings of 1.2e-7.
LOGIT_ATOL = 1e-5


def config(variant):
    return PerftConfig(variant=variant, task_type="CAUSAL_LM", r=4, init_weights=False)


def build(variant, **arguments):
    base = zoo.build("olmoe", **arguments)
    torch.manual_seed(1)
    return get_peft_model(base, config(variant)).eval()


def prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, zoo.VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def left_padded(rows):
    width = max(len(row) for row in rows)
    padding = [torch.full((width - len(row),), zoo.PAD_ID) for row in rows]
    ids = torch.stack([torch.cat(pair) for pair in zip(padding, rows, strict=True)])
    mask = torch.stack(
        [torch.cat([p.new_zeros(len(p)), torch.ones_like(r)]) for p, r in zip(padding, rows, strict=True)]
    )
    return {"input_ids": ids, "attention_mask": mask}


def alone(model, row, **arguments):
    """What the model writes after one prompt, by plain generate."""
    return model.generate(input_ids=row[None], **GREEDY | arguments)[0, len(row) :].tolist()


def assert_adapter_speaks(model, row):
    """Without it the text is another one, or the comparison would hold with the adapter lost."""
    with model.disable_adapter():
        base = alone(model, row)
    assert alone(model, row) != base


def small_cache():
    """Continuous batching, left to itself, sizes its cache to all free memory, which on a CPU is the machine's."""
    return ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=64)


@pytest.fixture
def compile_anywhere():
    """Ask generate to compile its decoding step on this device too."""
    torch._dynamo.reset()
    counters.clear()
    settings = CompileConfig()
    settings._compile_all_devices = True
    yield settings
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_static_cache_gives_the_same_tokens(variant):
    model, inputs = build(variant), left_padded(prompts(4, 6))
    dynamic = model.generate(**inputs, **GREEDY)
    assert model.generate(**inputs, **GREEDY, cache_implementation="static").equal(dynamic)
    assert_adapter_speaks(model, inputs["input_ids"][1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_compiled_decoding_step_gives_the_same_tokens_in_one_graph(variant, compile_anywhere):
    model, inputs = build(variant), left_padded(prompts(4, 6))
    eager = model.generate(**inputs, **GREEDY)
    compiled = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=compile_anywhere)
    assert compiled.equal(eager)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_continuous_batching_gives_what_each_prompt_gives_alone(variant, attention):
    model, rows = build(variant, attn_implementation=attention, eos_token_id=None), prompts(5, 9, 3, 1)
    # -1 is no token: continuous batching knows no min_new_tokens, so that the end may not be a token at all.
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=zoo.PAD_ID)
    expected = [alone(model, row, max_new_tokens=8, min_new_tokens=None) for row in rows]
    outputs = model.generate_batch(
        [row.tolist() for row in rows], generation_config=settings, continuous_batching_config=small_cache()
    )
    written = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    assert [written[tuple(row.tolist())] for row in rows] == expected
    assert_adapter_speaks(model, rows[0])


def test_continuous_batching_refuses_adapter_names_which_it_would_ignore():
    model = build("R")
    with pytest.raises(ValueError, match=r"generate_batch packs sequences.*use generate\(\) with adapter_names"):
        model.generate_batch([[5, 6, 7]], adapter_names=["default"], continuous_batching_config=small_cache())


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_assistant_does_not_change_the_text(variant):
    model, (row,) = build(variant), prompts(6)
    base = model.get_base_model()
    assistants = {"its base": zoo.build("olmoe"), "a stranger": zoo.build("olmoe", seed=3), "itself": base}
    expected = alone(model, row)
    assert {name: alone(model, row, assistant_model=other) for name, other in assistants.items()} == dict.fromkeys(
        assistants, expected
    )
    assert_adapter_speaks(model, row)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_assists_another_model(variant):
    bare, (row,) = zoo.build("olmoe"), prompts(6)
    expected = alone(bare, row)
    drafts = []
    assistant = build(variant)
    handle = assistant.get_base_model().register_forward_hook(lambda *_: drafts.append(1))
    assert alone(bare, row, assistant_model=assistant) == expected
    handle.remove()
    assert drafts, "the assistant was never asked"


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_alone_batched_and_under_every_experts_implementation(variant, family):
    rows = prompts(5, 9, 3)
    texts, logits = {}, {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        base = zoo.build(family, experts_implementation=implementation)
        torch.manual_seed(1)
        model = get_peft_model(base, config(variant)).eval()
        batch = left_padded(rows)
        with torch.no_grad():
            logits[implementation, "alone"] = torch.cat([model(input_ids=row[None]).logits[:, -1] for row in rows])
            logits[implementation, "batched"] = model(**batch).logits[:, -1]
        texts[implementation, "alone"] = [alone(model, row) for row in rows]
        texts[implementation, "batched"] = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :].tolist()
    reference = ("eager", "alone")
    differences = {way: (value - logits[reference]).abs().max().item() for way, value in logits.items()}
    print(f"largest logit difference: {max(differences.values()):.1e}")
    assert max(differences.values()) < LOGIT_ATOL, differences
    assert all(text == texts[reference] for text in texts.values())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("variant", ["R", "E"])
def test_in_bfloat16_implementations_differ_by_its_rounding(variant, implementation):
    (row,) = prompts(9)
    logits = {}
    for dtype, name in ((torch.float32, "eager"), (torch.bfloat16, implementation)):
        with torch.no_grad():
            logits[dtype] = build(variant, dtype=dtype, experts_implementation=name)(input_ids=row[None]).logits[:, -1]
    # Eight bits of mantissa (4e-3) through two layers of four products each, on logits up to 3; a router may not flip.
    assert (logits[torch.bfloat16].float() - logits[torch.float32]).abs().max() < 0.1


def mixed_model():
    model = build("R")
    model.add_adapter("two", config("E"))
    model.add_adapter("three", config("S"))
    return model.eval()


NAMES = ["default", "__base__", "two", "three"]


def each_alone(model, rows, **arguments):
    texts = []
    for row, name in zip(rows, NAMES, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                texts.append(alone(model, row, **arguments))
        else:
            model.set_adapter(name)
            texts.append(alone(model, row, **arguments))
    model.set_adapter("default")
    return texts


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_mixed_padded_batch_gives_each_row_its_adapters_text(cache, arguments):
    model, rows = mixed_model(), prompts(5, 9, 3, 6)
    expected = each_alone(model, rows, **arguments)
    assert expected != [alone(model, row, **arguments) for row in rows]
    batch = left_padded(rows)
    output = model.generate(**batch, **GREEDY, **arguments, cache_implementation=cache, adapter_names=NAMES)
    assert output[:, batch["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
def test_a_mixed_batch_decodes_compiled_in_one_graph(compile_anywhere):
    model, rows = mixed_model(), prompts(5, 9, 3, 6)
    batch = left_padded(rows)
    eager = model.generate(**batch, **GREEDY, adapter_names=NAMES)
    compiled = model.generate(
        **batch, **GREEDY, adapter_names=NAMES, cache_implementation="static", compile_config=compile_anywhere
    )
    assert compiled.equal(eager)
    assert not counters["graph_break"]


def test_a_named_adapter_speaks_with_an_assistant():
    model, (row,) = mixed_model(), prompts(6)
    expected = alone(model, row, adapter_names=["two"])
    assert expected != alone(model, row)
    assert alone(model, row, adapter_names=["two"], assistant_model=zoo.build("olmoe")) == expected


def test_a_mixed_batch_with_a_static_cache_refuses_wrong_names_and_goes_on():
    model, rows = mixed_model(), prompts(5, 9)
    batch = left_padded(rows)
    settings = GREEDY | {"cache_implementation": "static"}
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): four"):
        model.generate(**batch, **settings, adapter_names=["four", "two"])
    with pytest.raises(ValueError, match="got 3 and 2 respectively; give one name per row"):
        model.generate(**batch, **settings, adapter_names=["two", "two", "two"])
    assert model.generate(**batch, **settings).equal(model.generate(**batch, **GREEDY))
