"""``hf-moe run`` with two programs that know nothing of us: lm-evaluation-harness and ``transformers serve``."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM

from hf_moe_ext import PerftConfig
from support import zoo
from support.words import build_tokenizer

pytestmark = pytest.mark.slow

RUN = [sys.executable, "-m", "hf_moe_ext.cli", "run", "--"]
TASK = """task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ROWS = [
    {"question": f"w{5 + i} w{11 + 3 * i} w{20 + i}", "choices": ["w7 w8", "w30 w31", "w50"], "answer": i % 3}
    for i in range(6)
]


def needs(extra: str, *modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -c constraints.txt '{extra}'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``base``, an ``adapter`` of it, and ``served``: the base with the adapter's two files in it."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer()
    zoo.build("olmoe").save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(1)
    settings = PerftConfig(variant="R", task_type="CAUSAL_LM", r=4, init_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), settings)
    model.save_pretrained(folder / "adapter")
    shutil.copytree(folder / "base", folder / "served")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "adapter" / name, folder / "served")
    return folder


@torch.no_grad()
def own_loglikelihoods(model: torch.nn.Module) -> list[list[float]]:
    """Per row and choice: summed log-probability of the choice's words after the question's."""
    tokenizer, found = build_tokenizer(), []
    for row in ROWS:
        context = tokenizer(row["question"])["input_ids"]
        scores = []
        for choice in row["choices"]:
            answer = tokenizer(choice)["input_ids"]
            log_probs = model(input_ids=torch.tensor([context + answer])).logits[0].log_softmax(-1)
            scores.append(sum(log_probs[len(context) + i - 1, token].item() for i, token in enumerate(answer)))
        found.append(scores)
    return found


def harness(folder: Path, output: Path, model_args: str) -> list[list[float]]:
    """The loglikelihoods that ``lm_eval`` found, in the order of the rows."""
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tasks" / "words.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    command = ["lm_eval", "--model", "hf", "--model_args", f"{model_args},dtype=float32", "--tasks", "words"]
    command += ["--include_path", str(folder / "tasks"), "--device", "cpu", "--batch_size", "3"]
    result = subprocess.run(
        [*RUN, *command, "--output_path", str(output), "--log_samples"],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_DATASETS_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    (file,) = output.rglob("samples_words_*.jsonl")
    samples = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return [[float(response[0][0]) for response in sample["resps"]] for sample in samples]


def test_the_evaluation_harness_measures_the_adapter(folder, tmp_path):
    needs("lm_eval", "lm_eval")
    base = harness(folder, tmp_path / "base", f"pretrained={folder}/base")
    ours = harness(folder, tmp_path / "adapter", f"pretrained={folder}/base,peft={folder}/adapter")
    expected = own_loglikelihoods(AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval())
    # Sums of up to 2 float32 log-probabilities of some -5 each, batched and padded there, alone here.
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), atol=1e-4, rtol=0)
    assert (torch.tensor(base) - torch.tensor(ours)).abs().max() > 0.1


CONTINUOUS = ("--continuous-batching", "--cb-block-size", "16", "--cb-num-blocks", "16")


@pytest.fixture(scope="module", params=[(), CONTINUOUS], ids=["plain", "continuous"])
def server(request, folder) -> Iterator[str]:
    """The address of a ``transformers serve`` process that has loaded the folder; stopped afterwards."""
    needs("transformers[serving]", "fastapi", "uvicorn", "openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["transformers", "serve", str(folder / "served"), "--device", "cpu", "--host", "127.0.0.1"]
    command += ["--port", str(port), *request.param]
    log = folder / f"serve{port}.log"
    with log.open("w") as output, subprocess.Popen([*RUN, *command], stdout=output, stderr=output) as process:
        try:
            deadline = time.monotonic() + 240
            while not _is_up(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _ask(address: str, **body: object) -> dict:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_transformers_serve_answers_with_the_adapter(server, folder):
    prompt, tokenizer = "w5 w9 w33", build_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    texts = {}
    for name, model in (
        ("adapter", AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")),
        ("base", AutoModelForCausalLM.from_pretrained(folder / "base")),
    ):
        output = model.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        texts[name] = tokenizer.decode(output, skip_special_tokens=True)
    assert texts["adapter"] != texts["base"]
    settings = {"model": str(folder / "served"), "max_tokens": 8, "temperature": 0}
    completion = _ask(f"{server}/v1/completions", prompt=prompt, **settings)
    assert completion["choices"][0]["text"] == texts["adapter"]
    messages = [{"role": "user", "content": prompt}]
    chat = _ask(f"{server}/v1/chat/completions", messages=messages, **settings)
    assert chat["choices"][0]["message"]["content"] == texts["adapter"]
