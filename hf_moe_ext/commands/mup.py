"""``hf-moe coord-check`` and ``hf-moe transfer``: training at several widths."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from hf_moe_ext.commands.conventions import BAD_INPUT, Json, refusal_of


def coord_check(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="config.json, folder or Hub id; only that is read.")],
    widths: Annotated[str, typer.Option(help="Hidden sizes, at least two.")] = "64,128,256,512",
    steps: Annotated[int, typer.Option(help="Optimizer steps; bars are asked after 1, 3 and 6.")] = 6,
    seeds: Annotated[str, typer.Option(help="For the weights.")] = "0,1",
    learning_rate: Annotated[float, typer.Option(help="At the base width.")] = 4e-3,
    sequences: Annotated[int, typer.Option(help="Rows of the batch, drawn at random from the vocabulary.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 64,
    hold_latent: Annotated[bool, typer.Option("--hold-latent", help="A DCCA block's latent keeps its size.")] = False,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the JSON here.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw sizes against widths.")] = None,
    as_json: Json = False,
) -> None:
    """Train a configuration at several widths for a few steps; under µP no change of an activation grows with the width.

    Exit code: 0 all slopes are inside the bars, 1 one is outside, 2 refused.

    Example: hf-moe coord-check outputs/config.json --widths 64,128,256
    """
    from hf_moe_ext.mup.config_file import read_config
    from hf_moe_ext.mup.coord_check import check_coordinates
    from hf_moe_ext.mup.coord_input import parse_numbers
    from hf_moe_ext.mup.coord_report import as_json as to_json
    from hf_moe_ext.mup.coord_report import print_check, require_matplotlib, write_json, write_png
    from hf_moe_ext.mup.output_file import check_output_file

    with refusal_of("coord-check", (*BAD_INPUT, RuntimeError), on_one_line=True):
        for option, path in (("--output", output), ("--png", png)):
            if path is not None:
                check_output_file(option, path)
        if png is not None:
            require_matplotlib()
        check = check_coordinates(
            read_config(config),
            parse_numbers("widths", widths),
            num_steps=steps,
            seeds=parse_numbers("seeds", seeds),
            lr=learning_rate,
            num_sequences=sequences,
            sequence_length=length,
            hold_latent=hold_latent,
            device=device,
        )
        if output is not None:
            write_json(check, output)
        if png is not None:
            write_png(check, png)
    if as_json:
        typer.echo(to_json(check))
    else:
        from rich.console import Console

        print_check(check, Console(highlight=False))
    raise typer.Exit(0 if check.ok else 1)


def write_transfer(
    source: Annotated[
        str,
        typer.Option(
            "--from", metavar="SMALL_RUN", help="Output folder of a Trainer run, or of recipes/mup_transfer.py."
        ),
    ],
    target: Annotated[str, typer.Option("--to", metavar="CONFIG", help="config.json of the large model.")],
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="YAML to write, for recipes/pretrain.py --config.")
    ] = Path("transfer.yaml"),
    arguments: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML of the small run's training arguments, if it kept none.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the small run, if it does not tell.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of the small run, if it does not tell.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps of the large run. [default: the small one's]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per device and step. [default: the small one's]")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per row. [default: the small one's]")] = None,
    mode: Annotated[Literal["mup", "simplep"] | None, typer.Option(help="Of a sweep's arms. [default: mup]")] = None,
    trials: Annotated[
        int | None, typer.Option(help="Runs the tuning took. [default: those of the sweep, or 1]")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Write the training arguments of a large model, tell the FLOPs saved and which moves the theory does not cover.

    Exit code: 0 written, 2 refused.

    Example: hf-moe transfer --from outputs/small --to large/config.json --output transfer.yaml
    """
    from hf_moe_ext.mup.small_run import TransferError
    from hf_moe_ext.mup.transfer_report import format_report, write_transfer_file

    given = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    changes = {"max_steps": max_steps, "per_device_train_batch_size": batch_size, "max_length": max_length}
    with refusal_of("transfer", (TransferError, OSError)):
        result = write_transfer_file(
            source, target, output, arguments_file=arguments, given=given, changes=changes, mode=mode, num_trials=trials,
            overwrite=overwrite,
        )  # fmt: skip
    typer.echo(json.dumps(result.as_dict(), indent=2) if as_json else format_report(result, output))
