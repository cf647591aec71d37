"""``hf-moe run``."""

from typing import Annotated

import typer

from hf_moe_ext.commands.conventions import refusal_of


def run(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="A program and its arguments.")],
) -> None:
    """Run another program with PERFT adapters known to every Python in it, its children too.

    Examples: hf-moe run -- transformers serve FOLDER; hf-moe run -- lm_eval --model hf --model_args
    pretrained=MODEL,peft=ADAPTER --tasks TASK; hf-moe run -- python script.py; hf-moe run -- accelerate launch
    script.py. Exit code: the program's own; 2 if there is no such program.
    """
    from hf_moe_ext.launch import CommandError, run_program

    with refusal_of("run", (CommandError,)):
        run_program(command)
