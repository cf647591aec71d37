"""``hf-moe pilot``."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from hf_moe_ext.commands.conventions import BAD_INPUT, Json, refusal_of

STOPPED = 130  # what a shell calls a program that Ctrl-C ended


def run_pilot_command(
    model: Annotated[str, typer.Option(help="Hub id or folder of a causal language model.")],
    data: Annotated[
        str,
        typer.Option(
            help="Data set of the Hub, folder, or json/jsonl/csv/tsv/parquet/txt file (also .gz). Columns: text | prompt, "
            "completion | instruction, [input,] output | messages."
        ),
    ],
    held_out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rows to compare on. [default: split 'test', or a tenth of --data]"),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Gets everything; goes on there.")
    ] = Path("outputs/pilot"),
    budget_minutes: Annotated[float, typer.Option(help="Wall-clock time for all of it.")] = 20.0,
    processes: Annotated[int, typer.Option(help="Arms at a time.")] = 2,
    threads: Annotated[int | None, typer.Option(help="Of one arm. [default: the cores shared out]")] = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            help="One of the table, also with settings, as perft-r:num_experts=8,top_k=2,r=4; repeat the option. [default: "
            "all that fit the model and the budget]"
        ),
    ] = None,
    learning_rates: Annotated[
        list[float] | None, typer.Option(help="In place of every candidate's own; repeat the option.")
    ] = None,
    equal: Annotated[Literal["tokens", "time"], typer.Option(help="What every candidate gets alike.")] = "tokens",
    seed: Annotated[int, typer.Option(help="Of all that is drawn; the finalists' seeds count on from it.")] = 0,
    seeds: Annotated[int, typer.Option(help="Of every finalist.")] = 3,
    finalists: Annotated[int, typer.Option(help="Most candidates that train with every seed.")] = 4,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Of a finalist. With --candidates it fixes the plan: two runs have equal losses. [default: by the budget]"
        ),
    ] = None,
    min_steps: Annotated[int, typer.Option(help="Of the shortest arm.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = 8,
    max_length: Annotated[
        int, typer.Option(help="Tokens of a row; what is too much is cut from the prompt's left.")
    ] = 256,
    max_train_rows: Annotated[int | None, typer.Option(help="Draw so many. [default: all]")] = None,
    max_held_out_rows: Annotated[int, typer.Option(help="Draw so many.")] = 512,
    metric: Annotated[
        str | None,
        typer.Option(help="`evaluate` id, folder of a metric module, or 'choices': accuracy among answer choices."),
    ] = None,
    metric_rows: Annotated[int, typer.Option(help="Held-out rows that the metric is measured on.")] = 128,
    max_new_tokens: Annotated[int, typer.Option(help="Of a written answer.")] = 16,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Type the model is loaded in.")
    ] = "float32",
    hardware: Annotated[str | None, typer.Option(help="Price the full job on this row of the hardware table.")] = None,
    hardware_file: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML of more hardware.")] = None,
    price: Annotated[float | None, typer.Option(help="Of that device for an hour.")] = None,
    currency: Annotated[str, typer.Option(help="Of the price.")] = "USD",
    full_epochs: Annotated[float, typer.Option(help="Passes over the train rows of the full job.")] = 3.0,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to run the arms on, as 'auto'.")] = None,
    as_json: Json = False,
) -> None:
    """Train several methods side by side on your own rows, and say which one to take, or that no difference is shown.

    Learning rates are chosen by successive halving, finalists train with several seeds, and the cheapest that is not shown to
    be worse than the best is recommended. Writes report.html, report.md and pilot.json; the same command goes on with a
    pilot that was stopped.

    Example: hf-moe pilot --model allenai/OLMoE-1B-7B-0924 --data rows.jsonl --budget-minutes 60 --dtype bfloat16

    Exit code: 0 finished, 1 every trained candidate failed, 2 refused or out of disk space, 130 stopped.
    """
    with refusal_of("pilot", (*BAD_INPUT, RuntimeError)):
        import datasets
        from transformers.utils import logging

        from hf_moe_ext.pilot import PilotRequest
        from hf_moe_ext.pilot.progress import Progress
        from hf_moe_ext.pilot.report import format_answer, write_reports
        from hf_moe_ext.pilot.run import run_pilot

        request = PilotRequest(
            model, data, held_out, budget_minutes, processes, threads, seed, seeds, tuple(candidates or ()),
            tuple(learning_rates or ()), equal, steps, min_steps, finalists, batch_size, max_length, max_train_rows,
            max_held_out_rows, metric, metric_rows, max_new_tokens, dtype, hardware, hardware_file, price, currency,
            full_epochs, ray_address,
        )  # fmt: skip
        datasets.disable_progress_bars()  # the pilot has its own
        logging.disable_progress_bar()
        told = None
        try:
            told = run_pilot(request, output, Progress())
        except KeyboardInterrupt:
            typer.echo(
                f"hf-moe pilot: stopped; what is finished is in {output}, the same command goes on with it", err=True
            )
        pages = [] if told is None else write_reports(told, output)
    if told is None:
        raise typer.Exit(STOPPED)
    typer.echo(json.dumps(told, indent=2) if as_json else format_answer(told))
    typer.echo(f"Written: {', '.join(map(str, pages))}, {output / 'pilot.json'}", err=True)
    if not any(arm["status"] == "done" and arm["finalist"] for arm in told["arms"] if arm["candidate"] != "base"):
        raise typer.Exit(1)
