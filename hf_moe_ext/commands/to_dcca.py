"""``hf-moe to-dcca``."""

import json
from typing import Annotated, Literal

import typer

from hf_moe_ext.commands.conventions import Json, OutputFolder, Overwrite, refusal_of


def convert_to_dcca(
    model: Annotated[str, typer.Argument(help="Folder or Hub id: mixtral, olmoe, mixtral_ext or olmoe_ext.")],
    output: OutputFolder,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text file or folder of texts. [default: source of the Python standard library]"),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Text to measure on. [default: an eighth of the calibration text]")
    ] = None,
    latent_size: Annotated[int | None, typer.Option(help="Latent width R, a multiple of 8.")] = None,
    ratio: Annotated[float | None, typer.Option(help="R over the hidden size. [default: 0.25]")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to convert, as in 3,5-8. [default: all]")] = None,
    method: Annotated[
        Literal["data", "svd"], typer.Option(help="data: fitted on the text; svd: from the weights alone.")
    ] = "data",
    tokens: Annotated[int, typer.Option(help="Calibration tokens at most.")] = 65_536,
    held_out_tokens: Annotated[int, typer.Option(help="Tokens to measure on at most.")] = 16_384,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per row of text. [default: 512]")] = None,
    distill_steps: Annotated[int, typer.Option(help="Steps of distillation from the source; 0: none.")] = 0,
    distill_learning_rate: Annotated[float, typer.Option(help="Its peak learning rate.")] = 5e-4,
    distill_batch_rows: Annotated[int, typer.Option(help="Rows of text per step.")] = 4,
    distill_output_loss_coef: Annotated[
        float, typer.Option(help="Weight of the blocks' output errors beside the KL divergence.")
    ] = 0.0,
    distill_router: Annotated[bool, typer.Option(help="Train the converted layers' routers too.")] = False,
    seed: Annotated[int, typer.Option(help="Of the calibration sample and the distillation.")] = 0,
    overwrite: Overwrite = False,
    device: Annotated[str | None, typer.Option(help="Where to compute. [default: CUDA if there is one]")] = None,
    as_json: Json = False,
) -> None:
    """Convert a pretrained checkpoint, or chosen layers of it, to DCCA blocks fitted on a calibration text.

    Prints the layers' errors and the perplexity before and after. Exit code: 0 written, 2 refused.

    Example: hf-moe to-dcca allenai/OLMoE-1B-7B-0924 -o outputs/dcca --ratio 0.25 --layers 8-15
    """
    from hf_moe_ext.convert import to_dcca
    from hf_moe_ext.convert.conversion_plan import parse_layers
    from hf_moe_ext.convert.distillation import DistillationSettings

    steps = DistillationSettings(
        distill_steps, distill_learning_rate, distill_batch_rows, distill_output_loss_coef, distill_router
    )
    with refusal_of("to-dcca"):
        report = to_dcca(
            model,
            output,
            calibration,
            held_out=held_out,
            latent_size=latent_size,
            ratio=ratio,
            layers=None if layers is None else parse_layers(layers),
            method=method,
            num_tokens=tokens,
            num_held_out_tokens=held_out_tokens,
            sequence_length=sequence_length,
            distillation=steps,
            seed=seed,
            overwrite=overwrite,
            device=device,
        )
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        return
    from rich.console import Console

    from hf_moe_ext.convert.conversion_report import print_report

    print_report(report, Console(highlight=False))
