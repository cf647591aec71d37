"""An upcycled checkpoint: step-0 logits of its dense parent, whatever the form; opens, trains and generates."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_moe_ext.convert import upcycle
from hf_moe_ext.convert.logit_check import bound
from support.dense_models import PARENTS, check_equal, load_logits, make_ids, read_logits, read_weights, save_dense
from support.tiny_training import collate, rows

DELTAS = ("low_rank", "sparse", "quantized")
STOCK = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}


def list_cases() -> list[Any]:
    """Every parent, delta, universal expert, choice of layers and top_k; the fast run has each of them with each parent."""
    routes = list(itertools.product(("all", "every-other"), (1, 2, 4)))
    cases = []
    for number, blocks in enumerate(itertools.product(PARENTS, DELTAS, ("none", "keep", "extend"))):
        for place, route in enumerate(routes):
            marks = () if (number + number // 6) % 6 == place else (pytest.mark.slow,)
            cases.append(pytest.param(*blocks, *route, marks=marks))
    return cases


@pytest.mark.parametrize(("parent", "delta", "universal", "layers", "top_k"), list_cases())
def test_step_zero(tmp_path: Path, parent: str, delta: Any, universal: Any, layers: str, top_k: int) -> None:
    dense = save_dense(tmp_path / "dense", parent)
    report = upcycle(
        *(tmp_path / "dense", tmp_path / "moe"),
        **{"num_experts": 4, "top_k": top_k, "layers": layers, "delta": delta, "universal": universal, "rank": 3},
        verify=False,
    )
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert report.layers[1].block == ("ders" if layers == "all" else "dense")
    assert moe.config.moe_blocks == [layer.block for layer in report.layers]
    assert moe.config.model_type == report.model_type == STOCK.get(parent, "mixtral") + "_ext"
    check_equal(read_logits(moe), read_logits(dense))


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize(
    ("parent", "layers"), [("llama", "all"), ("mistral", "all"), ("qwen3", "all"), ("qwen3", "0,2")]
)
def test_step_zero_of_full_copies(tmp_path: Path, parent: str, layers: str, top_k: int) -> None:
    dense = save_dense(tmp_path / "dense", parent)
    report = upcycle(
        *(tmp_path / "dense", tmp_path / "moe"), form="vanilla", num_experts=4, top_k=top_k, layers=layers, verify=False
    )
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert type(moe).__module__.startswith("transformers.models.")
    assert report.model_type == STOCK[parent]
    assert sum(parameter.numel() for parameter in moe.parameters()) == report.num_parameters
    check_equal(read_logits(moe), read_logits(dense))


@pytest.mark.parametrize("parent", ["llama", "qwen3"])
@pytest.mark.parametrize("form", ["ders", "vanilla"])
def test_verify_notes_what_it_found(tmp_path: Path, parent: str, form: Any) -> None:
    save_dense(tmp_path / "dense", parent)
    report = upcycle(tmp_path / "dense", tmp_path / "moe", form=form)
    assert report.max_logit_difference is not None
    assert report.bound is not None
    assert report.max_logit is not None
    assert report.max_logit_difference == report.max_change < 1e-6 <= report.bound < 3e-6
    assert report.max_logit > 0.1
    assert "equal the parent's" in report.as_text()
    assert json.loads((tmp_path / "moe" / "upcycle.json").read_text()) == report.as_dict()


def test_verify_raises_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are not the FFN: one matrix read wrongly."""
    from hf_moe_ext.convert import upcycle_tensors

    right = upcycle_tensors.read_weight

    def wrong(plan: Any, reader: Any, name: str) -> Tensor:
        return right(plan, reader, name) * (1 + 1e-4 * name.endswith("1.mlp.up_proj.weight"))

    monkeypatch.setattr(upcycle_tensors, "read_weight", wrong)
    save_dense(tmp_path / "dense")
    with pytest.raises(RuntimeError, match=r"logits differ from the parent's by up to .* nothing was written"):
        upcycle(tmp_path / "dense", tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_the_bound_grows_with_the_model() -> None:
    assert bound(3, 64, 0.5) == 1e-6
    assert bound(3, 64, 5.0) == pytest.approx(5e-6)
    assert bound(32, 4096, 1.0) == pytest.approx(64e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["ders", "vanilla"])
def test_other_types_are_kept(tmp_path: Path, form: Any, dtype: torch.dtype) -> None:
    """Compared in float32 at least: rounding of 16-bit weights is the same on both sides."""
    save_dense(tmp_path / "dense", dtype=dtype)
    report = upcycle(tmp_path / "dense", tmp_path / "moe", form=form)
    assert report.max_logit_difference is not None
    assert report.max_logit_difference <= 1e-6
    assert {tensor.dtype for tensor in read_weights(tmp_path / "moe").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").dtype == dtype
    work = torch.promote_types(dtype, torch.float32)
    eager: dict[str, Any] = {"dtype": work, "experts_implementation": "eager"}
    check_equal(load_logits(tmp_path / "moe", **eager), load_logits(tmp_path / "dense", dtype=work))


def test_another_type(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "mistral")
    report = upcycle(tmp_path / "dense", tmp_path / "moe", dtype="bfloat16", delta="quantized")
    assert report.max_logit_difference is not None
    assert report.max_logit_difference <= 1e-6
    kinds = {name.rpartition("_")[2]: tensor.dtype for name, tensor in read_weights(tmp_path / "moe").items()}
    assert kinds["codes"] == torch.uint8
    assert set(kinds.values()) == {torch.uint8, torch.bfloat16}
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).float()
    check_equal(load_logits(tmp_path / "moe", dtype=torch.float32), read_logits(rounded))


# A stock mixtral always makes its gates sum to 1: refused in test_upcycle_plan.py.
@pytest.mark.parametrize(("parent", "form"), [("llama", "ders"), ("qwen3", "ders"), ("qwen3", "vanilla")])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gates_as_they_are(tmp_path: Path, parent: str, form: Any, top_k: int) -> None:
    """Each layer starts as the sum of its kept probabilities times the FFN; the report has the sums."""
    dense = save_dense(tmp_path / "dense", parent)
    settings = {"num_experts": 4, "top_k": top_k, "norm_topk_prob": False, "router_std": 0.1}
    report = upcycle(tmp_path / "dense", tmp_path / "moe", form=form, **settings)
    assert report.max_logit_difference is not None
    assert report.max_logit_difference <= 1e-6
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    sums: list[Tensor] = []
    for layer in moe.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: sums.append(output[1].sum(-1)))
    found = read_logits(moe)
    for layer, each in zip(dense.model.layers, sums, strict=True):
        scale = each.view(*make_ids().shape, 1)
        layer.mlp.register_forward_hook(lambda _, __, output, scale=scale: output * scale)
    check_equal(found, read_logits(dense))
    assert report.max_change is not None
    for layer in report.layers:
        assert layer.gate_sum is not None
        assert layer.gate_sum == pytest.approx(1, abs=1e-6) if top_k == 4 else 0.2 < layer.gate_sum < 0.95
    assert (report.max_change > 0.01) == (top_k < 4)
    assert "times the dense FFN" in report.as_text()


_OPEN = """
import sys
{refuse}
import torch
from transformers import AutoModelForCausalLM
inputs, results = torch.load("inputs.pt"), {{}}
for name in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad(): logits = model.eval()(inputs["ids"]).logits
    results[name] = logits, model.generate(inputs["ids"][:, :6], max_new_tokens=12, do_sample=False, top_p=1.0)
torch.save(results, "results.pt")
"""
_REFUSE = """
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_moe_ext": raise AssertionError(name)
sys.meta_path.insert(0, Refuse())
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ders", "vanilla"])
def test_opens_and_generates_in_a_fresh_process(tmp_path: Path, form: Any) -> None:
    """Full copies where this package cannot be imported."""
    torch.save({"ids": make_ids()}, tmp_path / "inputs.pt")
    dense = {}
    for parent in STOCK:
        dense[parent] = save_dense(tmp_path / "dense" / parent, parent)
        upcycle(tmp_path / "dense" / parent, tmp_path / parent, form=form, verify=False)
    code = _OPEN.format(refuse=_REFUSE if form == "vanilla" else "import hf_moe_ext")
    root = str(Path(__file__).resolve().parents[2])
    path = {} if form == "vanilla" else {"PYTHONPATH": root}
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | path
    result = subprocess.run(
        [sys.executable, "-c", code, *STOCK],
        **{"cwd": tmp_path, "env": variables, "capture_output": True, "text": True, "timeout": 300},
    )
    assert result.returncode == 0, result.stderr
    results = torch.load(tmp_path / "results.pt")
    for parent, model in dense.items():
        logits, generated = results[parent]
        check_equal(logits, read_logits(model))
        assert generated.shape[1] > 6
        wanted = model.generate(make_ids()[:, :6], max_new_tokens=12, do_sample=False, top_p=1.0)
        assert torch.equal(generated, wanted)


@pytest.mark.parametrize("parent", ["llama-biased", "qwen3"])
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("universal", ["none", "extend"])
def test_trains(tmp_path: Path, parent: str, delta: Any, universal: Any) -> None:
    """One step: base, router and what trains of the deltas move, codes and masks do not; the loss has both terms."""
    save_dense(tmp_path / "dense", parent)
    upcycle(
        *(tmp_path / "dense", tmp_path / "moe"),
        **{"delta": delta, "universal": universal, "num_experts": 4, "layers": [0, 2], "drop_rate": 0.7},
        verify=False,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=8, report_to="none", disable_tqdm=True,
        use_cpu=True, logging_steps=1, save_strategy="no", dataloader_pin_memory=False, optim="sgd", learning_rate=0.5,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": rows()}), data_collator=collate)
    trainer.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    experts = "model.layers.{}.mlp.experts."
    for layer in (0, 2):
        own = experts.format(layer)
        trained = {"low_rank": "delta_up_B", "sparse": "delta_up_values"}.get(delta)
        assert {own + "gate_up_proj", own + "down_proj", f"model.layers.{layer}.mlp.gate.weight"} <= moved
        assert trained is None or own + trained in moved
        assert not {name for name in moved if name.endswith(("stream", "codes", "scales"))}
    assert "model.layers.1.mlp.up_proj.weight" in moved
    output = model(**collate([{"input_ids": row} for row in rows()[:4]]))
    assert output.aux_loss is not None
    assert output.aux_loss > 0


def test_router_gradient_of_one_expert_a_token(tmp_path: Path) -> None:
    """Why top_k=1 with gates that are made 1 is warned of, and that what is offered instead helps."""
    save_dense(tmp_path / "dense")

    def router_gradient(name: str, **settings: Any) -> float:
        report = upcycle(
            *(tmp_path / "dense", tmp_path / name), top_k=1, num_experts=4, delta="sparse", verify=False, **settings
        )
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():  # experts that differ
            for key, parameter in model.named_parameters():
                if "delta_" in key:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(key)))
        model(input_ids=make_ids(), labels=make_ids(), output_router_logits=False).loss.backward()
        stuck = any("never reaches the router" in text for text in report.warnings)
        gradient = model.model.layers[0].mlp.gate.weight.grad
        size = 0.0 if gradient is None else float(gradient.abs().max())
        assert stuck == (size < 1e-7), (name, size)
        return size

    router_gradient("stuck")
    router_gradient("raw", norm_topk_prob=False)
    router_gradient("universal", universal="extend")


def test_router_gradient_of_two_experts_a_token(tmp_path: Path) -> None:
    """Gates that sum to 1 over equal experts: none at step 0, one as soon as an update has told the experts apart."""
    save_dense(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", top_k=2, num_experts=4, verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    shares = []
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=make_ids(), labels=make_ids(), output_router_logits=False).loss.backward()
        greatest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
        shares.append(max(float(layer.mlp.gate.weight.grad.abs().max()) for layer in model.model.layers) / greatest)
        optimizer.step()
    assert shares[0] < 1e-6 < 1e-5 < shares[1], shares
