"""``hf-moe delta`` and its three commands."""

from typing import Annotated, Literal

import typer

from hf_moe_ext.commands.conventions import Json, OutputFolder, Overwrite, print_report, refusal_of

_SUMMARY = "Updates of a checkpoint as small files beside an untouched base."

app = typer.Typer(name="delta", help=_SUMMARY, short_help=_SUMMARY, no_args_is_help=True)


@app.command("diff", short_help="Write what changed between two checkpoints of one model.")
def diff_delta(
    base: Annotated[str, typer.Argument(help="Folder of the checkpoint that stays.")],
    new: Annotated[str, typer.Argument(help="Folder of the other.")],
    output: OutputFolder,
    encode: Annotated[
        Literal["random_drop", "magnitude_drop", "svd", "quantize"] | None,
        typer.Option(help="Store changed experts' matrices with loss. [default: bit for bit]"),
    ] = None,
    drop_rate: Annotated[float | None, typer.Option(help="Of a drop. [default: 0.6]")] = None,
    rank: Annotated[int | None, typer.Option(help="Of svd.")] = None,
    bits: Annotated[int | None, typer.Option(help="Of quantize, or of a drop's values.")] = None,
    group_size: Annotated[int, typer.Option(help="Entries that share a scale.")] = 128,
    as_json: Json = False,
) -> None:
    """Write a delta folder: the tensors, and the single experts of stacks, that changed. Exit code: 0 written, 2 refused.

    Example: hf-moe delta diff base-folder new-folder -o outputs/delta
    """
    from hf_moe_ext.convert.delta_apply import diff_checkpoints
    from hf_moe_ext.convert.delta_encoding import Encoding

    with refusal_of("delta diff"):
        if encode is None and (drop_rate, rank, bits) != (None, None, None):
            raise ValueError("--drop-rate, --rank and --bits are of a lossy delta; name its --encode")
        encoding = None if encode is None else Encoding(encode, drop_rate, rank, bits, group_size)
        report = diff_checkpoints(base, new, output, encoding=encoding)
    print_report(report, as_json)


@app.command("apply", short_help="Base and delta to the new checkpoint.")
def apply_delta_folder(
    base: Annotated[str, typer.Argument(help="Folder of the base; not touched.")],
    delta: Annotated[str, typer.Argument(help="Delta folder.")],
    output: OutputFolder,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the new checkpoint; a base that is not the delta's is refused by hash. Exit code: 0 written, 2 refused.

    Example: hf-moe delta apply base-folder outputs/delta -o outputs/new
    """
    from hf_moe_ext.convert.delta_apply import apply_delta

    with refusal_of("delta apply"):
        report = apply_delta(base, delta, output, overwrite=overwrite)
    print_report(report, as_json)


@app.command("revert", short_help="New checkpoint and delta back to the base, to the byte.")
def revert_delta_folder(
    new: Annotated[str, typer.Argument(help="Folder of the new checkpoint; not touched.")],
    delta: Annotated[str, typer.Argument(help="Delta folder, without loss.")],
    output: OutputFolder,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the base back, byte for byte. Exit code: 0 written, 2 refused.

    Example: hf-moe delta revert new-folder outputs/delta -o outputs/base
    """
    from hf_moe_ext.convert.delta_apply import revert_delta

    with refusal_of("delta revert"):
        report = revert_delta(new, delta, output, overwrite=overwrite)
    print_report(report, as_json)
