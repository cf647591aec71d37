"""``upcycle``: a dense Llama, Mistral, Granite or Qwen3 checkpoint to a Mixture-of-Experts one that starts with the same logits.

The order of work: the refusals (`upcycle_plan`, `dense_parents`), the numbers (`upcycle_count`), the tensors one at a time
(`upcycle_tensors`) and the comparison with the parent (`upcycle_check`), in a folder that gets its name at the end.
Source: DeRS, arXiv 2503.01359, sections on upcycling; full copies: sparse upcycling, arXiv 2212.05055.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from hf_moe_ext.convert.checkpoint import (
    DEFAULT_SHARD_BYTES,
    CheckpointReader,
    CheckpointWriter,
    check_target,
    copy_side_files,
    write_folder,
)
from hf_moe_ext.convert.upcycle_check import compare
from hf_moe_ext.convert.upcycle_count import count, warn_of_bytes
from hf_moe_ext.convert.upcycle_plan import STORED_BYTES, UpcyclePlan, UpcycleSettings, plan_upcycle
from hf_moe_ext.convert.upcycle_report import UpcycleReport
from hf_moe_ext.convert.upcycle_tensors import read_weight, write_tensors


def upcycle(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    form: Literal["ders", "vanilla"] = "ders",
    num_experts: int = 8,
    top_k: int = 2,
    layers: str | Sequence[int] = "all",
    delta: Literal["low_rank", "sparse", "quantized"] = "low_rank",
    rank: int = 4,
    drop_rate: float = 0.9,
    bits: int = 4,
    universal: Literal["none", "keep", "extend"] = "none",
    norm_topk_prob: bool = True,
    router_std: float = 0.02,
    router_aux_loss_coef: float = 0.01,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    dry_run: bool = False,
    verify: bool = True,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> UpcycleReport:
    """Write a Mixture-of-Experts checkpoint whose experts are the dense parent's FFNs.

    Every expert starts as the FFN of its layer and gates sum to 1, so logits are the parent's, to rounding. One FFN matrix
    and one shard are in memory at a time; ``verify`` loads whole models, the result and then the parent, in float32.

    Where ``router_aux_loss_coef`` is above 0 the result's config.json has ``output_router_logits=True``: a loss computed
    with labels then contains the load-balance loss.

    Args:
        source: folder or Hub id of a llama, mistral, granite or qwen3 model in safetensors, not quantised.
        output: folder to write: config.json, safetensors, the parent's tokenizer and generation settings, upcycle.json.
        form: "ders": one shared base and a delta per expert, ``mixtral_ext`` or ``qwen3_moe_ext``; "vanilla": full copies,
            stock ``mixtral`` or ``qwen3_moe``, which opens without this package.
        num_experts: N, at least 2.
        top_k: experts per token.
        layers: "all"; "every-other": 0, 2, 4, ...; numbers and ranges such as "0-11,14"; or a list. The others stay dense.
        delta: "low_rank": A random, B zero; "sparse": values zero at positions that the seed regenerates; "quantized":
            codes zero, which no training moves.
        rank: of low-rank deltas.
        drop_rate: share of a sparse delta's entries that are zero.
        bits: of a quantised delta's entry.
        universal: "none"; "keep": the whole FFN stays beside the experts; "extend": as one more delta on the same base.
            Its gate is 1 - s and the routed ones share s, the largest router probability.
        norm_topk_prob: make the gates of the chosen experts sum to 1. False: each layer starts as the sum of the kept
            probabilities times its FFN; the report says by how much.
        router_std: spread of the routers' weights, which are the same for both forms at one seed.
        router_aux_loss_coef: of the load-balance loss.
        seed: of routers, low-rank factors and masks.
        dtype: of the result's weights; None: as stored.
        dry_run: check and count; write nothing.
        verify: compare logits on random tokens before the folder gets its name.
        overwrite: replace an existing output folder.
        max_shard_bytes: largest safetensors file.

    Returns:
        What was done, which is also in the output folder.

    Raises:
        ValueError, TypeError: a request that cannot be carried out, a parent without an exact home, an adapter, an
            incomplete checkpoint; nothing was written.
        FileExistsError: the output exists.
        FileNotFoundError: the source has no safetensors weights, or a shard is missing.
        RuntimeError: the result's logits are not what they should be; nothing was written.
    """
    began = time.monotonic()
    target = Path(output)
    check_target(target, overwrite, keep=Path(source))
    settings = UpcycleSettings(
        *(form, num_experts, top_k, layers, delta, rank, drop_rate, bits, universal, norm_topk_prob, router_std),
        *(router_aux_loss_coef, seed, dtype),
    )
    plan = plan_upcycle(source, settings)
    reader = CheckpointReader(plan.source)
    names = plan.check_names(reader)
    ffn_dtype = read_weight(plan, reader, f"model.layers.{plan.layers[0]}.mlp.down_proj.weight").dtype
    report = _start_report(source, output, plan)
    report.num_bytes_before = sum(math.prod(reader.shape(name)) * STORED_BYTES[reader.dtype(name)] for name in names)
    count(plan, ffn_dtype, report)
    warn_of_bytes(plan, ffn_dtype, report)
    if dry_run:
        return report
    plan.config.dtype = ffn_dtype
    with write_folder(target, overwrite) as staging:
        with CheckpointWriter(staging, max_shard_bytes) as writer:
            write_tensors(plan, names, reader, writer)
        report.num_bytes = writer.num_bytes
        plan.config.save_pretrained(staging)
        copy_side_files(plan.source, staging)
        if verify:
            compare(plan, staging, ffn_dtype, report)
        report.written = True
        report.seconds = round(time.monotonic() - began, 1)
        report.write(staging)
    return report


def _start_report(source: Any, output: Any, plan: UpcyclePlan) -> UpcycleReport:
    said = asdict(plan.settings) | {"layers": plan.layers, "dtype": None}
    if plan.dtype is not None:
        said["dtype"] = str(plan.dtype).removeprefix("torch.")
    return UpcycleReport(
        source=str(source),
        output=str(output),
        settings=said,
        parent_type=plan.parent.model_type,
        model_type=plan.config.model_type,
        warnings=list(plan.warnings),
    )
