"""``hf-moe push``."""

from typing import Annotated

import typer

from hf_moe_ext.commands.conventions import BAD_INPUT, Json, print_report, refusal_of


def push_to_hub(
    folder: Annotated[str, typer.Argument(help="Folder of a saved adapter or model.")],
    repo_id: Annotated[str, typer.Argument(help="Repository: name, or organisation/name; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it is not there.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card, when the folder has none yet.")] = None,
    with_checkpoints: Annotated[
        bool, typer.Option("--with-checkpoints", help="Also checkpoint-* with their optimizer states (pickles).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list; ask the Hub nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Push an adapter or model to the Hub: checked first, one commit, read back.

    Only safetensors, never pickles; a card is rendered where there is none. The token is that of `hf auth login` or
    HF_TOKEN. Run it again after a failure: what arrived is not sent twice. Exit code: 0 pushed, 2 refused or failed.

    Example: hf-moe push outputs/quickstart our-team/quickstart --private
    """
    from hf_moe_ext.hub import HubError, push

    with refusal_of("push", (*BAD_INPUT, HubError)):
        report = push(
            folder,
            repo_id,
            private=private,
            revision=revision,
            message=message,
            license=license,
            include_checkpoints=with_checkpoints,
            dry_run=dry_run,
        )
    print_report(report, as_json)
