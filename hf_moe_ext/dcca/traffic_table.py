"""The traffic for people."""

import re
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from hf_moe_ext.dcca.traffic import LayerTraffic, Traffic


def print_traffic(traffic: Traffic, console: Console) -> None:
    """Write layers, steps and, if there is one, the measurement."""
    again = ", the forward pass twice" if traffic.passes.recompute else ""
    console.print(
        f"Bytes that one of {traffic.ep_size} ranks sends to the others; {traffic.num_tokens} tokens per rank, "
        f"{traffic.element_bytes} bytes an element, uniform routing; training is forward and backward{again}.",
        soft_wrap=True,
    )
    for implementation, rows in traffic.layers.items():
        console.print(f"\n{implementation}")
        for _, group in groupby(rows, key=_likeness):
            _print_layers(list(group), console)
        step = traffic.step_bytes(implementation)
        full = sum(row.training_at_full_width.payload for row in rows)
        console.print(
            f"one training step, {len(rows)} layers: payload {format_bytes(step.payload)} ({step.payload / full:.4g} of full "
            f"width), metadata {format_bytes(step.metadata)}, {step.num_collectives} all-to-alls"
            if full
            else f"one training step, {len(rows)} layers: nothing leaves the only rank",
            soft_wrap=True,
        )
    if traffic.measured is not None:
        _print_measured(traffic, console)


def format_bytes(count: float) -> str:
    """With a binary unit, four digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def _likeness(row: LayerTraffic) -> tuple[object, ...]:
    layer = row.layer
    return layer.width, layer.hidden_size, layer.num_experts, layer.top_k


def _print_layers(rows: list[LayerTraffic], console: Console) -> None:
    first, last, layer = rows[0], rows[-1], rows[0].layer
    name = layer.name
    if len(rows) > 1:
        numbers = [next(iter(re.findall(r"\d+", row.layer.name)), "") for row in (first, last)]
        name = f"{re.sub(r'[0-9]+', f'[{numbers[0]}-{numbers[1]}]', name, count=1)}: {len(rows)} layers,"
    else:
        name += ":"
    width = f"width {layer.width} of {layer.hidden_size}"
    console.print(
        f"{name} top-{layer.top_k} of {layer.num_experts} experts, {width}, {first.rows:.6g} rows each way",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    table = Table(box=box.SIMPLE)
    for head in ("per layer", "payload", "metadata", "all-to-alls"):
        table.add_column(head, justify="left" if head == "per layer" else "right")
    for what, found in (("forward", first.forward), ("training step", first.training)):
        table.add_row(what, format_bytes(found.payload), format_bytes(found.metadata), f"{found.num_collectives}")
    if layer.width != layer.hidden_size:
        full = first.training_at_full_width
        table.add_row(
            "the same at full width", format_bytes(full.payload), format_bytes(full.metadata), f"{full.num_collectives}"
        )
    console.print(table)


def _print_measured(traffic: Traffic, console: Console) -> None:
    report = traffic.measured or {}
    table = Table(
        box=box.SIMPLE, title=f"measured, mean of {report['num_steps']} steps and {report['world_size']} ranks"
    )
    for head in ("kind", "direction", "pass", "calls", "rows", "to others", "largest rank", "to itself"):
        table.add_column(head, justify="left" if head in ("kind", "direction", "pass") else "right")
    for flow in report["flows"]:
        table.add_row(
            flow["kind"],
            flow["direction"],
            flow["pass"],
            f"{flow['num_calls']:.4g}",
            f"{flow['num_rows']:.4g}",
            format_bytes(flow["off_rank_bytes"]),
            format_bytes(flow["largest_rank_off_rank_bytes"]),
            format_bytes(flow["own_bytes"]),
        )
    console.print(table)
    payload, metadata = (traffic.measured_bytes(kind) or 0.0 for kind in ("payload", "metadata"))
    console.print(
        f"measured per step: payload {format_bytes(payload)}, metadata {format_bytes(metadata)}", soft_wrap=True
    )
    for implementation in traffic.layers:
        expected = traffic.step_bytes(implementation).payload
        if expected:
            console.print(f"payload over the formula of {implementation}: {payload / expected:.4g}")
    console.print(
        "The formula is of one pass over --tokens; a step of several micro-batches sends that many times as much.",
        soft_wrap=True,
    )
