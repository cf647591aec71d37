"""``hf-moe env`` and ``hf-moe doctor``: what is installed here, and what would train."""

import json
from typing import Annotated, Any, Literal

import typer

from hf_moe_ext.commands.conventions import Json, print_report, refusal_of


def env(as_json: Json = False) -> None:
    """Versions, devices and whether they are the tested ones: text to paste into an issue.

    Example: hf-moe env --json
    """
    from hf_moe_ext.environment import read_environment

    environment = read_environment()
    print_report(environment, as_json)


def doctor(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_ADAPTER",
            help="A model (Hub id or folder; only its config.json is read) or the folder of a saved adapter.",
        ),
    ],
    base_model: Annotated[
        str | None, typer.Option(help="For a saved adapter: the base model to check it against.", metavar="MODEL")
    ] = None,
    as_json: Json = False,
    variant: Annotated[
        Literal["R", "E", "D", "S"] | None,
        typer.Option(help="R: own router; E: base router; D: all always on; S: a single one. [default: R]"),
    ] = None,
    adapter: Annotated[Literal["lora", "parallel"] | None, typer.Option(help="Kind. [default: lora]")] = None,
    r: Annotated[int | None, typer.Option("--r", help="Bottleneck width. [default: 16]")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="The scale is lora_alpha / r. [default: 32]")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Dropout probability. [default: 0]")] = None,
    num_experts: Annotated[int | None, typer.Option(help="R, D: adapters per layer. [default: 4]")] = None,
    top_k: Annotated[int | None, typer.Option(help="R: adapters per token. [default: 2]")] = None,
    normalize_top_k: Annotated[
        bool | None, typer.Option(help="R: make the chosen weights sum to 1. [default: as the base router does]")
    ] = None,
    router_aux_loss_coef: Annotated[float | None, typer.Option(help="R: load-balance loss. [default: 0.01]")] = None,
    router_z_loss_coef: Annotated[float | None, typer.Option(help="R: z-loss. [default: 0]")] = None,
    router_aux_loss_scope: Annotated[
        Literal["batch", "sequence", "global"] | None,
        typer.Option(help="R: tokens over which the load is balanced. [default: sequence]"),
    ] = None,
    base_router: Annotated[
        Literal["frozen", "lora", "train"] | None,
        typer.Option(help="What of the base model's own router trains. [default: frozen]"),
    ] = None,
    base_router_drift_coef: Annotated[
        float | None, typer.Option(help="How strongly a tuned base router is held back. [default: 0.1]")
    ] = None,
    shared_A: Annotated[
        bool | None, typer.Option("--shared_A", help="R, E, D: one A for all adapters of a layer. [default: no]")
    ] = None,
    target_modules: Annotated[
        list[str] | None, typer.Option(help="Experts modules to adapt; repeat it. [default: every MoE block's]")
    ] = None,
    exclude_modules: Annotated[list[str] | None, typer.Option(help="Experts modules to leave out; repeat it.")] = None,
    layers_to_transform: Annotated[list[int] | None, typer.Option(help="Layers to adapt; repeat it.")] = None,
    layers_pattern: Annotated[str | None, typer.Option(help="Name of the layer list, if not a common one.")] = None,
    modules_to_save: Annotated[list[str] | None, typer.Option(help="Modules to train whole; repeat it.")] = None,
    bias: Annotated[Literal["none", "all"] | None, typer.Option(help="Train the biases too. [default: none]")] = None,
    task_type: Annotated[str | None, typer.Option(help="PEFT's task type: the head. [default: causal LM]")] = None,
) -> None:
    """What would train, what it costs and what is wrong, before anything is loaded or spent.

    The options are those of PerftConfig, for a new adapter. Exit code: 0 nothing is wrong, 1 something is, 2 bad usage.

    Example: hf-moe doctor allenai/OLMoE-1B-7B-0924 --variant R --top-k 2
    """
    from hf_moe_ext.perft.doctor import TargetError, diagnose

    options = _given_options(context, besides=("target", "base_model", "as_json"))
    with refusal_of("doctor", (TargetError,)):
        diagnosis = diagnose(target, options, base_model)
    if as_json:
        typer.echo(json.dumps(diagnosis.as_dict(), indent=2))
    else:
        from rich.console import Console

        from hf_moe_ext.perft.doctor.tables import print_diagnosis

        print_diagnosis(diagnosis, Console(highlight=False))
    raise typer.Exit(0 if diagnosis.ok else 1)


def _given_options(context: typer.Context, besides: tuple[str, ...]) -> dict[str, Any]:
    """The options the user wrote; those left out keep the default of the class they are passed to."""
    given = {name: value for name, value in context.params.items() if name not in besides and value is not None}
    # An option that may be repeated is an empty sequence when it was not given at all.
    return {n: list(v) if isinstance(v, tuple | list) else v for n, v in given.items() if v not in ((), [])}
