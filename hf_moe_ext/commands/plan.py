"""``hf-moe plan``."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hf_moe_ext.commands.conventions import Json, refusal_of


def plan_sparsity(
    hardware: Annotated[str, typer.Option(help="Row of the hardware table, as H100-SXM or RTX-4090.")],
    devices: Annotated[int, typer.Option(help="How many of them train.")] = 1,
    flops: Annotated[float | None, typer.Option(help="Budget: training FLOPs, forward and backward.")] = None,
    gpu_hours: Annotated[float | None, typer.Option(help="Budget: hours of one device, all devices together.")] = None,
    money: Annotated[float | None, typer.Option(help="Budget: rent, moved bytes and effort; needs --price.")] = None,
    price: Annotated[float | None, typer.Option(help="Of a device for an hour.")] = None,
    price_per_gb: Annotated[float, typer.Option(help="Of 10^9 bytes moved.")] = 0.0,
    moved_gb: Annotated[float, typer.Option(help="Data and checkpoints that are paid for.")] = 0.0,
    effort_hours: Annotated[float, typer.Option(help="Of people, once.")] = 0.0,
    effort_price: Annotated[float, typer.Option(help="Of a person for an hour.")] = 0.0,
    currency: Annotated[str, typer.Option(help="Its name.")] = "USD",
    memory_gb: Annotated[
        float | None, typer.Option(help="Usable of a device, in 10^9 bytes. [default: 90 % of the hardware's]")
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Different training tokens there are.")] = None,
    epochs: Annotated[float, typer.Option(help="How often each may be read.")] = 1.0,
    serve_tokens: Annotated[float | None, typer.Option(help="Tokens to generate over the model's life.")] = None,
    serve_context: Annotated[int, typer.Option(help="Tokens of a served sequence.")] = 4096,
    serve_sequences: Annotated[int, typer.Option(help="Served at a time on one device.")] = 32,
    present_cost: Annotated[
        float | None, typer.Option(help="Of a million tokens from what serves today, to compare with doing nothing.")
    ] = None,
    context_length: Annotated[int, typer.Option(help="Of training sequences.")] = 4096,
    vocab_size: Annotated[int, typer.Option(help="Of the tokenizer.")] = 50304,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Of an optimizer step. [default: a published fit, a power of two]")
    ] = None,
    precision: Annotated[
        Literal["autocast", "bfloat16", "float32", "megatron"], typer.Option(help="Of weights and states.")
    ] = "autocast",
    utilisation: Annotated[float, typer.Option(help="Share of rented time in which steps run.")] = 0.9,
    imbalance: Annotated[float, typer.Option(help="Rows of the busiest rank over the mean.")] = 1.0,
    family: Annotated[Literal["olmoe_ext", "mixtral_ext"], typer.Option(help="Of the model.")] = "olmoe_ext",
    blocks: Annotated[str, typer.Option(help="Of standard, dcca, ders; with commas.")] = "standard,dcca,ders",
    target: Annotated[
        Literal["general", "reading", "reasoning"], typer.Option(help="What it is for; adds cautions.")
    ] = "general",
    indifference: Annotated[float, typer.Option(help="Plans this near the best count as equal in quality.")] = 0.05,
    efficiency: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON that `hf-moe calibrate` wrote. [default: assumptions]")
    ] = None,
    law: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your own fit, of recipes/fit_law.py, shown beside the published laws."),
    ] = None,
    hardware_file: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML of more hardware.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="With every intermediate value.")] = False,
    as_json: Json = False,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Table of all priced plans.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Report, one file.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Report, without figures.")] = None,
    emit_config: Annotated[
        Path | None, typer.Option(metavar="DIR", help="config.json and training arguments of the recommended plan.")
    ] = None,
) -> None:
    """How many experts, how many active, at this budget, on this hardware, for this money.

    Exit code: 0 planned, 2 nothing fits or the question is wrong.

    Example: hf-moe plan --hardware H100-SXM --devices 64 --gpu-hours 20000
    """
    with refusal_of("plan"):
        from hf_moe_ext.scaling.hardware import find_hardware
        from hf_moe_ext.scaling.laws.fitted import read_law
        from hf_moe_ext.scaling.money import Prices
        from hf_moe_ext.scaling.plan_explain import as_csv
        from hf_moe_ext.scaling.plan_explain import explain as explain_result
        from hf_moe_ext.scaling.plan_files import emit_config as write_files
        from hf_moe_ext.scaling.plan_request import Inference, PlanRequest
        from hf_moe_ext.scaling.plan_text import format_plan
        from hf_moe_ext.scaling.planner import plan

        inference = None
        if serve_tokens is not None:
            inference = Inference(serve_tokens, serve_context, serve_sequences, present_cost_per_million=present_cost)
        elif present_cost is not None:
            raise ValueError("--present-cost needs --serve-tokens: how much is served")
        request = PlanRequest(
            find_hardware(hardware, hardware_file), devices, flops, gpu_hours, money,
            prices=None if price is None else Prices(price, price_per_gb, effort_hours, effort_price, currency),
            memory_bytes=None if memory_gb is None else memory_gb * 1e9,
            token_supply=tokens, max_epochs=epochs, inference=inference, vocab_size=vocab_size,
            context_length=context_length, family=family, blocks=tuple(one.strip() for one in blocks.split(",")),
            precision=precision, efficiency=_read_efficiency(efficiency), imbalance=imbalance, utilisation=utilisation,
            batch_tokens=batch_tokens, moved_bytes=moved_gb * 1e9, target=target, indifference=indifference,
        )  # fmt: skip
        result = plan(request, None if law is None else read_law(law))
        told = explain_result(result, details=explain or html is not None or markdown is not None)
        if emit_config is not None:
            write_files(result.recommended, request, emit_config)
        if csv is not None:
            _write(csv, as_csv(result))
        if markdown is not None or html is not None:
            from hf_moe_ext.scaling.report import render_html, render_markdown

            if markdown is not None:
                _write(markdown, render_markdown(told))
            if html is not None:
                _write(html, render_html(told))
    typer.echo(json.dumps(told, indent=2) if as_json else format_plan(told, explain))


def _read_efficiency(path: Path | None) -> Any:
    from hf_moe_ext.scaling.rank_seconds import Efficiency

    if path is None:
        return Efficiency()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Efficiency(**values["efficiency"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"--efficiency {path} must be JSON with an object efficiency, as hf-moe calibrate --output writes it: {error}"
        ) from error


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
