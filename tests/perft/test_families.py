"""The life of a PERFT adapter on a tiny random model of every family: birth, one training step, saving, generation."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_moe_ext import PerftConfig
from support import zoo

VARIANTS = "REDS"
EVERY = [(family, variant) for family in zoo.FAMILIES for variant in VARIANTS]
# One variant per family where all sixty would cost too much: in turn, so that each variant meets several families.
ROTATED = [(family, VARIANTS[position % 4]) for position, family in enumerate(zoo.FAMILIES)]
# Families whose model returns its base routers' logits when asked to.
RECORDS_ROUTER_LOGITS = set(zoo.FAMILIES) - {"nemotron_h"}


def adapt(model: nn.Module, variant: str, **settings) -> PeftModel:
    kind = "parallel" if variant in "ED" else "lora"
    return get_peft_model(model, PerftConfig(variant=variant, adapter=kind, r=4, **settings)).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    batch = zoo.random_batch()
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize(("family", "variant"), EVERY)
def test_attaching_changes_no_bit(family, variant):
    base, model = zoo.build(family), adapt(zoo.build(family), variant)
    batch = {key: value for key, value in zoo.random_batch().items() if key != "labels"}
    if family in RECORDS_ROUTER_LOGITS:
        batch["output_router_logits"] = True
    with torch.no_grad():
        before, after = base(**batch), model(**batch)
    assert torch.equal(before.logits, after.logits)
    if family in RECORDS_ROUTER_LOGITS:
        # The adapters' own router is no base router: the base auxiliary loss must not see it.
        assert len(before.router_logits) == len(after.router_logits) == 2
        for one, other in zip(before.router_logits, after.router_logits, strict=True):
            assert torch.equal(one, other)
    # And the adapter is really there: with its B away from zero it speaks.
    for name, parameter in model.named_parameters():
        if "perft_B" in name:
            nn.init.normal_(parameter, std=0.5)
    assert not torch.equal(logits(model), before.logits)
    with model.disable_adapter():
        assert torch.equal(logits(model), before.logits)


@pytest.mark.parametrize(("family", "variant"), EVERY)
def test_a_trainer_step_changes_the_adapter_only(family, variant, tmp_path):
    model = adapt(zoo.build(family), variant, init_weights=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = zoo.random_batch(batch=2)
    rows = [{key: value[row] for key, value in batch.items()} for row in range(2)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    result = Trainer(model, arguments, train_dataset=rows).train()
    assert 0 < result.training_loss < 20
    after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if "perft_" in name}
    tensors = 3 if variant == "R" else 2
    assert len(changed) == tensors * 2  # in each of two blocks
    assert all(torch.isfinite(after[name]).all() for name in changed)


@pytest.mark.parametrize(("family", "variant"), EVERY)
def test_saved_adapter_reopens_bit_equal(family, variant, tmp_path):
    model = adapt(zoo.build(family), variant, init_weights=False)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    base = zoo.build(family)
    assert not torch.equal(logits(base), expected)
    torch.manual_seed(1)  # whatever the loader draws before it reads the file
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), expected)


@pytest.mark.parametrize(("family", "variant"), ROTATED)
def test_saved_adapter_reopens_by_its_folder_alone(family, variant, tmp_path):
    """`AutoModelForCausalLM.from_pretrained(adapter)`: base model and adapter from disk, through Transformers alone."""
    zoo.build(family).save_pretrained(tmp_path / "base")
    model = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), variant, init_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert not isinstance(reopened, PeftModel)
    assert torch.equal(logits(reopened.eval()), logits(model))


@pytest.mark.parametrize(("family", "variant"), ROTATED)
def test_generating_with_cache_equals_without(family, variant):
    """Float64, where no rounding can turn a greedy choice; a cached step sends one token per row through the layer."""
    model = adapt(zoo.build(family, dtype=torch.float64), variant, init_weights=False)
    prompt = zoo.random_batch(batch=2, length=5, seed=3)["input_ids"].clamp(min=3)
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "attention_mask": torch.ones_like(prompt)}
    cached = model.generate(input_ids=prompt, use_cache=True, **settings)
    assert cached.shape == (2, 11)
    assert torch.equal(cached, model.generate(input_ids=prompt, use_cache=False, **settings))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(input_ids=prompt, use_cache=True, **settings))
