"""``hf-moe compress``."""

from typing import Annotated, Literal

import typer

from hf_moe_ext.commands.conventions import Json, OutputFolder, Overwrite, print_report, refusal_of


def compress_experts(
    moe: Annotated[
        str, typer.Argument(help="Folder or Hub id: mixtral, olmoe, qwen3_moe, or *_ext of standard blocks.")
    ],
    output: OutputFolder,
    parent: Annotated[str | None, typer.Option(help="The dense model whose FFN the experts were copied from.")] = None,
    base: Annotated[
        Literal["parent", "mean", "least_squares"], typer.Option(help="What the experts share; parent needs --parent.")
    ] = "parent",
    encode: Annotated[
        Literal["random_drop", "magnitude_drop", "svd", "quantize"], typer.Option(help="How deltas are stored.")
    ] = "random_drop",
    drop_rate: Annotated[float | None, typer.Option(help="Share of a delta that is dropped. [default: 0.6]")] = None,
    rank: Annotated[int | None, typer.Option(help="Of svd. [default: an eighth of the smaller dimension]")] = None,
    bits: Annotated[
        int | None, typer.Option(help="Of quantize (default 4), or of a drop's values. [default: as they are]")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Entries that share a scale.")] = 128,
    seed: Annotated[int, typer.Option(help="Of random positions.")] = 0,
    target_bytes: Annotated[int | None, typer.Option(help="Size of the files; chooses a rate for each matrix.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Relative output error of any matrix; chooses a rate for each.")
    ] = None,
    min_cosine: Annotated[float, typer.Option(help="Refuse experts less close to the base than this.")] = 0.9,
    force: Annotated[bool, typer.Option("--force", help="Go on with experts that are further away.")] = False,
    export: Annotated[Literal["stock"] | None, typer.Option(help="Write ordinary experts instead.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text (JSONL with text and slice, text file, folder) to measure perplexity on.")
    ] = None,
    max_loss: Annotated[float | None, typer.Option(help="Refuse a larger rise of the loss, in nats per token.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, choose, print; write nothing.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compress a trained Mixture of Experts that was made from a dense model, and tell how close it stays.

    Exit code: 0 written, 2 refused.

    Example: hf-moe compress our-team/moe -o outputs/small --parent our-team/dense --drop-rate 0.6
    """
    from hf_moe_ext.convert import compress

    with refusal_of("compress"):
        report = compress(
            moe, output, parent=parent, base=base, encode=encode, drop_rate=drop_rate, rank=rank, bits=bits,
            group_size=group_size, seed=seed, target_bytes=target_bytes, max_error=max_error, min_cosine=min_cosine,
            force=force, export=export, calibration=calibration, max_loss=max_loss, dry_run=dry_run, overwrite=overwrite,
        )  # fmt: skip
    print_report(report, as_json)
