"""One arm: a process of its own that trains one candidate with one rate and one seed, measures, and writes one JSON."""

import math
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from hf_moe_ext.pilot.folder import NoSpaceError, read_json, write_json

DONE, FAILED = "done", "failed"
NO_SPACE_CODE = 28  # of the process that found the disk full


def serve_arm(spec_path: Path, result_path: Path, parent: int) -> int:
    """Run the arm of a file; a failure of the arm is a result too.

    Args:
        spec_path: JSON of the arm.
        result_path: Gets its result.
        parent: Process that started it; the arm ends when that one does.

    Returns:
        The exit code of its process.
    """
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    spec = read_json(spec_path)
    try:
        result = run_arm(spec)
    except NoSpaceError as error:
        print(error, file=sys.stderr)
        return NO_SPACE_CODE
    except ArmFailed as error:
        result = {"status": FAILED, "reason": str(error)}
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:  # torch's out-of-memory is a RuntimeError
        result = {"status": FAILED, "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    try:
        write_json(result_path, {"spec": spec, **result})
    except NoSpaceError as error:
        print(error, file=sys.stderr)
        return NO_SPACE_CODE
    return 0


class ArmFailed(Exception):
    """The arm cannot be compared; the others go on."""


def run_arm(spec: dict[str, Any]) -> dict[str, Any]:
    """Load, attach, train, measure.

    Args:
        spec: `id`, `candidate`, `learning_rate`, `seed`, `max_steps`, `stage`, and the pilot's `model`, `folder`,
            `batch_size`, `max_length`, `dtype`, `threads`, `metric`, `metric_rows`, `max_new_tokens`.

    Returns:
        `status`; `deterministic`: what two runs with one seed share; `measured`: times and memory, which they do not.

    Raises:
        ArmFailed: A loss is not a number.
    """
    began = time.monotonic()
    import torch
    from transformers import DataCollatorForSeq2Seq, set_seed

    from hf_moe_ext.pilot import attachment, measures, rows
    from hf_moe_ext.pilot.candidates import Candidate
    from hf_moe_ext.pilot.subject import load_tokenizer
    from hf_moe_ext.pilot.training import Watch, build_trainer
    from hf_moe_ext.row_losses import measure_losses

    torch.set_num_threads(spec["threads"])
    folder, candidate = Path(spec["folder"]), Candidate.from_dict(spec["candidate"])
    tokenizer = load_tokenizer(spec["model"])
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    train_rows = rows.load_side(folder, rows.TRAIN)
    set_seed(spec["seed"])
    base = attachment.load_base(spec["model"], spec["dtype"])
    model = attachment.attach(base, candidate, train_rows, collator)
    counts = attachment.count_parameters(model, candidate)
    watch = Watch()
    deterministic: dict[str, Any] = {"parameters": counts, "steps": 0, "tokens": 0}
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix=".arm-", dir=folder) as scratch:
        trainer = build_trainer(model, spec, candidate, tokenizer, collator, train_rows, watch, scratch)
        measured["startup_s"] = time.monotonic() - began
        if candidate.kind != "base" and spec["max_steps"]:
            trainer.train()
            if watch.failure is not None:
                raise ArmFailed(f"{watch.failure}, at learning rate {spec['learning_rate']:g}")
            deterministic |= {"steps": trainer.state.global_step, "tokens": int(trainer.state.num_input_tokens_seen)}
            deterministic["train_loss"] = watch.last_loss
            measured["step_s"] = median(watch.seconds[2:] or watch.seconds)
            measured["train_s"] = sum(watch.seconds)
        measured["peak_bytes"] = measures.peak_bytes()
        side = rows.HELD_OUT if spec["stage"] == "final" else rows.CHOICE
        began_measuring = time.monotonic()
        with measures.watch_routers(model) as health:
            losses = measure_losses(trainer, rows.load_side(folder, side))
        measured["losses_s"] = time.monotonic() - began_measuring
        if not math.isfinite(losses.mean):
            raise ArmFailed(
                f"the {side.replace('_', '-')} loss is {losses.mean}, at learning rate {spec['learning_rate']:g}"
            )
        deterministic |= {"side": side, "loss": losses.mean, "routing": health}
        if spec["stage"] == "final":
            deterministic["nats"] = losses.nats.tolist()
            deterministic["row_tokens"] = losses.tokens.tolist()
            deterministic["metric"] = measures.measure_metric(trainer, tokenizer, folder, spec)
            deterministic["stored_bytes"] = _save(model, candidate, folder / "adapters" / spec["id"])
            measured |= measures.measure_latency(model, rows.load_side(folder, side)[0]["input_ids"])
        measured["wall_s"] = time.monotonic() - began
    return {"status": DONE, "deterministic": deterministic, "measured": measured}


def _save(model: Any, candidate: Any, folder: Path) -> int:
    from hf_moe_ext.pilot.attachment import save_adapter
    from hf_moe_ext.pilot.folder import full_disk_told

    with full_disk_told(folder.parent):
        return save_adapter(model, candidate, folder)


def _end_with(parent: int) -> None:
    """An arm whose pilot was killed ends too, whatever killed it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
