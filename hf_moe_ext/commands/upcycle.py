"""``hf-moe upcycle``."""

from typing import Annotated, Literal

import typer

from hf_moe_ext.commands.conventions import BAD_INPUT, Json, OutputFolder, Overwrite, print_report, refusal_of


def upcycle_checkpoint(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a dense model: llama, mistral, granite or qwen3.")],
    output: OutputFolder,
    form: Annotated[
        Literal["ders", "vanilla"],
        typer.Option(help="ders: a shared base and a delta per expert; vanilla: full copies, a stock checkpoint."),
    ] = "ders",
    num_experts: Annotated[int, typer.Option(help="Experts of a layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 2,
    layers: Annotated[str, typer.Option(help="Layers that get experts: all, every-other, or as in 0-11,14.")] = "all",
    delta: Annotated[Literal["low_rank", "sparse", "quantized"], typer.Option(help="Form of the deltas.")] = "low_rank",
    rank: Annotated[int, typer.Option(help="Of low-rank deltas.")] = 4,
    drop_rate: Annotated[float, typer.Option(help="Share of a sparse delta's entries that are zero.")] = 0.9,
    bits: Annotated[int, typer.Option(help="Of a quantised delta's entry: 16, 8, 4, 2 or 1.")] = 4,
    universal: Annotated[
        Literal["none", "keep", "extend"],
        typer.Option(help="An expert for every token. keep: the whole FFN; extend: one more delta on the base."),
    ] = "none",
    norm_topk_prob: Annotated[
        bool, typer.Option(help="Make gates sum to 1, as equal logits need; else layers start as a share of the FFN.")
    ] = True,
    router_std: Annotated[float, typer.Option(help="Spread of the routers' weights.")] = 0.02,
    router_aux_loss_coef: Annotated[float, typer.Option(help="Of the load-balance loss; 0: none.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of routers, low-rank factors and masks.")] = 0,
    dtype: Annotated[
        Literal["float64", "float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the result's weights. [default: as stored]"),
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare logits of result and parent; loads both, one after the other, in float32.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and count; write nothing.")] = False,
    overwrite: Overwrite = False,
    max_shard_bytes: Annotated[int, typer.Option(help="Largest safetensors file.")] = 5_000_000_000,
    as_json: Json = False,
) -> None:
    """Make a dense model's FFNs the experts of a Mixture-of-Experts model that starts with the same logits.

    Prints parameters and bytes by part, and the greatest difference of a logit. Exit code: 0 written, 2 refused.

    Example: hf-moe upcycle Qwen/Qwen3-0.6B -o outputs/moe --num-experts 8 --rank 4
    """
    from hf_moe_ext.convert import upcycle

    with refusal_of("upcycle", (*BAD_INPUT, RuntimeError)):
        report = upcycle(
            source,
            output,
            form=form,
            num_experts=num_experts,
            top_k=top_k,
            layers=layers,
            delta=delta,
            rank=rank,
            drop_rate=drop_rate,
            bits=bits,
            universal=universal,
            norm_topk_prob=norm_topk_prob,
            router_std=router_std,
            router_aux_loss_coef=router_aux_loss_coef,
            seed=seed,
            dtype=dtype,
            dry_run=dry_run,
            verify=verify,
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
        )
    print_report(report, as_json)
