"""``hf-moe measure-hardware`` and ``hf-moe calibrate``: what the cost model knows of a machine."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from hf_moe_ext.commands.conventions import Json, refusal_of


def measure_hardware_row(
    name: Annotated[str, typer.Option(help="Of the row.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file that the row is added to; for --hardware-file.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="[default: CUDA if there is one]")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Of products. [default: bfloat16 on CUDA, float32 on a CPU]"),
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="Small sizes: a first look in a second.")] = False,
    as_json: Json = False,
) -> None:
    """Time products, grouped products and memory here, and under torchrun the all-to-all between its ranks.

    Run it on an idle machine: the best of a few repetitions is kept. Exit code: 0 measured, 2 refused.

    Example: hf-moe measure-hardware --name our-box --output hardware.toml
    """
    from dataclasses import asdict

    from hf_moe_ext.hardware_timing import is_first_rank, measure_hardware

    with refusal_of("measure-hardware", (ValueError, OSError)):
        row = measure_hardware(name, device=device, dtype=dtype, size="small" if small else "full", output=output)
    if is_first_rank():
        from hf_moe_ext.scaling.hardware import format_hardware

        typer.echo(json.dumps(asdict(row), indent=2) if as_json else format_hardware(row), nl=as_json)


def calibrate_efficiency(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Output folder or trainer_state.json of a run, or a JSON of seconds.")
    ],
    config: Annotated[str, typer.Option(metavar="MODEL", help="Hub id, folder or config.json; only that is read.")],
    hardware: Annotated[str, typer.Option(help="Device: a known row.")],
    num_sequences: Annotated[int, typer.Option(help="Rows of a micro-batch on one rank.")],
    sequence_length: Annotated[int, typer.Option(help="Tokens of a row.")],
    hardware_file: Annotated[Path | None, typer.Option(metavar="FILE", help="More rows, as in hardware.toml.")] = None,
    precision: Annotated[
        Literal["float32", "bfloat16", "autocast", "megatron"], typer.Option(help="autocast: Trainer's bf16.")
    ] = "autocast",
    micro_batches: Annotated[int, typer.Option(help="Per rank and step (gradient_accumulation_steps).")] = 1,
    recompute: Annotated[Literal["none", "selective", "full"], typer.Option(help="full: checkpointing.")] = "none",
    data: Annotated[int, typer.Option(help="Ranks that see other tokens.")] = 1,
    expert: Annotated[int, typer.Option(help="Ranks that share the experts (ep_size).")] = 1,
    tensor: Annotated[int, typer.Option(help="Ranks that share other matrices.")] = 1,
    pipeline: Annotated[int, typer.Option(help="Stages.")] = 1,
    zero: Annotated[int, typer.Option(help="0 DDP, 1, 2, 3 = FSDP.")] = 0,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the JSON here.")] = None,
) -> None:
    """Solve for the shares of the peaks at which the cost model predicts a measured run; prints JSON.

    The run's own seconds per step are trainer_state.json's; a JSON {"step_s": ..., "experts_s": ..., "all_to_all_s": ...,
    "optimizer_s": ...} tells more. Exit code: 0 solved, 2 refused.

    Example: hf-moe calibrate outputs/run --config outputs/run --hardware H100-SXM --num-sequences 4 --sequence-length 2048
    """
    from dataclasses import asdict

    from hf_moe_ext.scaling.calibrate import calibrate, read_measured
    from hf_moe_ext.scaling.hardware import find_hardware
    from hf_moe_ext.scaling.layout import Layout
    from hf_moe_ext.scaling.memory import TrainingStep
    from hf_moe_ext.scaling.operations import Tokens
    from hf_moe_ext.scaling.roofline import training_time
    from hf_moe_ext.scaling.shape import MoeShape

    with refusal_of("calibrate"):
        measured, device = read_measured(run), find_hardware(hardware, hardware_file)
        layout = Layout(data=data, expert=expert, tensor=tensor, pipeline=pipeline, zero=zero)  # type: ignore[arg-type]
        step = TrainingStep(Tokens(num_sequences, sequence_length), precision, "adamw", recompute, micro_batches)
        shape = MoeShape.from_hf(config)
        efficiency = calibrate(shape, layout, step, device, measured)
        result = {
            "measured": asdict(measured),
            "efficiency": asdict(efficiency),
            "step": training_time(shape, layout, step, device, efficiency).as_dict(),
        }
        text = json.dumps(result, indent=2)
        if output is not None:
            output.write_text(text + "\n", encoding="utf-8")
    typer.echo(text)
