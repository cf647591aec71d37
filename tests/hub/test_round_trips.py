"""What a reader of the Hub loads is what was trained, whoever pushed it: we, PEFT or the Trainer."""

from pathlib import Path

import pytest

from support.hub_client import content, messages, run
from support.hub_server import LocalHub

SAVE = """
import sys, torch
from peft import get_peft_model
from hf_moe_ext import OlmoeExtConfig, PerftConfig, push
from support import zoo
from transformers import AutoModelForCausalLM
torch.manual_seed(3)
kind, folder = sys.argv[1], sys.argv[2]
ids = torch.arange(14).reshape(2, 7)
if kind == "ext":
    small = zoo.build("olmoe").config.to_dict() | {"moe_block": "dcca", "moe_latent_size": 16}
    small = {key: value for key, value in small.items() if key not in ("model_type", "architectures", "transformers_version")}
    model = AutoModelForCausalLM.from_config(OlmoeExtConfig(**small))
else:
    zoo.build("olmoe").save_pretrained(folder + "/base")
    base = AutoModelForCausalLM.from_pretrained(folder + "/base")
    model = get_peft_model(base, PerftConfig(variant="R", r=4, init_weights=False, task_type="CAUSAL_LM"))
torch.save(model.eval()(input_ids=ids).logits, folder + "/logits.pt")
"""
LOAD = """
import sys, torch
import hf_moe_ext
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
loader = AutoModelForCausalLM if sys.argv[1] == "ext" else AutoPeftModelForCausalLM
model = loader.from_pretrained(sys.argv[3])
ids = torch.arange(14).reshape(2, 7)
assert torch.equal(model.eval()(input_ids=ids).logits, torch.load(sys.argv[2] + "/logits.pt"))
print(type(model).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("ext", "OlmoeExtForCausalLM"), ("adapter", "PeftModelForCausalLM")])
def test_pushed_and_pulled_gives_equal_logits(hub: LocalHub, tmp_path: Path, kind: str, name: str) -> None:
    saved = run(hub, kind, tmp_path, python=SAVE + "push(model, 'our-team/trained')")
    assert saved.returncode == 0, saved.stderr
    loaded = run(hub, kind, tmp_path, "our-team/trained", python=LOAD)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == name


PUSH_THREE_TIMES = """
push(model, "ours")
with torch.no_grad():
    next(p for p in model.parameters() if p.requires_grad).add_(1)
torch.save(model.eval()(input_ids=ids).logits, folder + "/logits.pt")
model.push_to_hub("tester/ours", commit_message="again")
model.push_to_hub("tester/theirs")
"""


@pytest.mark.slow
def test_peft_pushes_weights_that_load_under_a_card_of_its_own(hub: LocalHub, tmp_path: Path) -> None:
    """`PeftModel.push_to_hub` saves its own card last, and the one on the Hub wins: after our push it stays ours."""
    saved = run(hub, "adapter", tmp_path, python=SAVE + PUSH_THREE_TIMES)
    assert saved.returncode == 0, saved.stderr
    assert "hf_moe_ext: card" not in content(hub, "tester/theirs", "README.md").decode()
    assert messages(hub, "tester/ours") == ["again", "Weights, card and configuration", "initial commit"]
    assert 'from_pretrained("tester/ours")' in content(hub, "tester/ours", "README.md").decode()
    for repo_id in ("tester/theirs", "tester/ours"):
        loaded = run(hub, "adapter", tmp_path, repo_id, python=LOAD)
        assert loaded.returncode == 0, loaded.stderr


TRAINER = """
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from hf_moe_ext import ModelCardCallback
rows = Dataset.from_list([{"input_ids": [1, 5, 6, 7], "labels": [1, 5, 6, 7]}] * 4)
arguments = TrainingArguments(folder + "/out", max_steps=1, report_to="none", use_cpu=True, hub_model_id="tester/trained", save_strategy="no")
metrics = folder + "/metrics.json"
open(metrics, "w").write('{"loss": {"before": 3.0, "after": 2.5, "rows": 9}}')
trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[ModelCardCallback(metrics, license="mit")])
trainer.train()
trainer.push_to_hub()
torch.save(model.eval()(input_ids=ids).logits, folder + "/logits.pt")
"""


@pytest.mark.slow
def test_the_trainer_pushes_our_card(hub: LocalHub, tmp_path: Path) -> None:
    saved = run(hub, "adapter", tmp_path, python=SAVE + TRAINER)
    assert saved.returncode == 0, saved.stderr
    card = content(hub, "tester/trained", "README.md").decode()
    assert "| held-out loss, nats per token | 3.0000 | 2.5000 |" in card
    assert "license: mit" in card
    assert "generated automatically" not in card
    assert str(tmp_path) not in card
    loaded = run(hub, "adapter", tmp_path, "tester/trained", python=LOAD)
    assert loaded.returncode == 0, loaded.stderr
