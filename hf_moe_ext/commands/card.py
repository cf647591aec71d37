"""``hf-moe card``."""

import json
from typing import Annotated, Any

import typer

from hf_moe_ext.commands.conventions import Json, refusal_of


def write_model_card(
    folder: Annotated[str, typer.Argument(help="Folder of a saved adapter or model.")],
    metrics: Annotated[
        str | None, typer.Option(help="What was measured; metrics.json in the folder where it is not given.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Id of its license, such as apache-2.0.")] = None,
    name: Annotated[
        str | None, typer.Option(help="What from_pretrained is to be given, such as our-team/model.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write here; README.md of the folder.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if the card is another.")] = False,
    as_json: Json = False,
) -> None:
    """Render the card of an adapter or model from its configuration and its metrics.

    A number without a source is refused, and what is not measured is said to be so. Exit code: 0 written or the same,
    1 with --check if the card would change, 2 refused.

    Example: hf-moe card outputs/quickstart --license apache-2.0
    """
    from pathlib import Path

    from hf_moe_ext.cards import CARD, check_card, find_metrics, render_card, write_card

    with refusal_of("card"):
        source = metrics or find_metrics(folder)
        options: dict[str, Any] = {"license": license, "name": name}
        if check:
            place, same = Path(folder) / CARD, check_card(folder, source, **options)
        elif output is None:
            place, same = write_card(folder, source, **options), True
        else:
            place, same = Path(output), True
            place.write_text(render_card(folder, source, **options), encoding="utf-8")
    said = {"card": str(place), "metrics": str(source) if source else None, "as_rendered": same}
    text = f"{place} {'is as rendered' if check else 'written'}" + ("" if source else "; no metrics, so no results")
    typer.echo(json.dumps(said, indent=2) if as_json else text if same else f"{place} is not the card of its files.")
    raise typer.Exit(0 if same else 1)
