"""``hf-moe fold``."""

from typing import Annotated

import typer

from hf_moe_ext.commands.conventions import BAD_INPUT, Json, OutputFolder, Overwrite, print_report, refusal_of


def fold_multipliers(
    source: Annotated[str, typer.Argument(help="Folder or Hub id: mixtral_ext or olmoe_ext, every block standard.")],
    output: OutputFolder,
    untie: Annotated[
        bool, typer.Option("--untie", help="Give a model whose head is its embedding a head of its own.")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Compare logits of source and result; loads both, one after the other.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the factors; write nothing.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Multiply the forward multipliers of a model into its weights: equal logits, and no trace of this package.

    Equal to the last bit where every factor is a power of two, else up to rounding. Exit code: 0 written, 2 refused.

    Example: hf-moe fold outputs/trained -o outputs/stock
    """
    from hf_moe_ext.convert import fold

    with refusal_of("fold", (*BAD_INPUT, RuntimeError)):
        report = fold(source, output, untie=untie, verify=verify, dry_run=dry_run, overwrite=overwrite)
    print_report(report, as_json)
