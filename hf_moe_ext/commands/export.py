"""``hf-moe export``."""

from typing import Annotated

import typer

from hf_moe_ext.commands.conventions import BAD_INPUT, Json, OutputFolder, Overwrite, print_report, refusal_of


def export_experts(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a model with moe_block='ders'.")],
    output: OutputFolder,
    verify: Annotated[
        bool, typer.Option(help="Compare logits of source and result; loads both in float32, one after the other.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print; write nothing.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write experts that share a base as ordinary ones: a stock checkpoint, for engines that know no other.

    What else a stock model has no place for keeps the result an *_ext model, and is named. Exit code: 0 written, 2 refused.

    Example: hf-moe export outputs/trained -o outputs/stock
    """
    from hf_moe_ext.convert import export

    with refusal_of("export", (*BAD_INPUT, RuntimeError)):
        report = export(source, output, verify=verify, dry_run=dry_run, overwrite=overwrite)
    print_report(report, as_json)
