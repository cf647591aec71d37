"""``hf-moe traffic``."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from hf_moe_ext.commands.conventions import Json, refusal_of


def traffic(
    config: Annotated[str, typer.Option(metavar="MODEL", help="Hub id, folder or config.json; only that is read.")],
    ep: Annotated[int, typer.Option(metavar="RANKS", help="Ranks that share the experts (ep_size).")],
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of one rank in one pass: sequences times length.")],
    implementation: Annotated[
        Literal["all_to_all", "latent_all_to_all"] | None,
        typer.Option(help="Dispatcher (ep_implementation). [default: both]"),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32", "float64"], typer.Option(help="Of the hidden states on the wire.")
    ] = "bfloat16",
    recomputed: Annotated[bool, typer.Option("--recomputed", help="With gradient checkpointing.")] = False,
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="traffic.json that TrafficCallback wrote into output_dir.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What each rank sends to others per layer and per training step, payload and routing metadata apart.

    By formula for uniform routing; DCCA layers beside the same layers at full width; with --measured beside what a run
    sent. Exit code: 2 where the traffic cannot be told.

    Example: hf-moe traffic --config allenai/OLMoE-1B-7B-0924 --ep 8 --tokens 8192
    """
    from hf_moe_ext.dcca.traffic import TrafficError, compute_traffic, read_layers
    from hf_moe_ext.scaling.exchange import IMPLEMENTATIONS

    element_bytes = {"float32": 4, "float64": 8}.get(dtype, 2)
    wanted = IMPLEMENTATIONS if implementation is None else (implementation,)
    with refusal_of("traffic", (TrafficError,)):
        result = compute_traffic(read_layers(config), ep, tokens, wanted, element_bytes, recomputed, measured)
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        from rich.console import Console

        from hf_moe_ext.dcca.traffic_table import print_traffic

        print_traffic(result, Console(highlight=False))
