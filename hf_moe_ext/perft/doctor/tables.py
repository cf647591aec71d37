"""The diagnosis for people."""

import re

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hf_moe_ext.perft.doctor.diagnosis import TRAINING_BYTES_PER_PARAMETER, Diagnosis, Finding
from hf_moe_ext.perft.report import TrainableRow, format_bytes

_BESIDE_SHOWN = 4


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Write all of it: who, what trains, what it costs, how it routes, what is wrong."""
    _print_head(diagnosis, console)
    if diagnosis.rows:
        _print_trainable(diagnosis, console)
        _print_cost(diagnosis, console)
    if diagnosis.router is not None:
        _print_router(diagnosis, console)
    _print_findings(diagnosis.findings, console)


def group_rows(rows: list[TrainableRow]) -> list[tuple[str, list[TrainableRow]]]:
    """Rows alike but for their layer number together, under a name such as ``model.layers.[1-15].mlp.experts``."""
    groups: dict[object, list[TrainableRow]] = {}
    for row in rows:
        # With two numbers in a path, which of them counts the layers is anyone's guess.
        path = re.sub(r"\d+", "#", row.module) if len(re.findall(r"\d+", row.module)) == 1 else row.module
        groups.setdefault((path, *row.tensors.items()), []).append(row)
    return [(_group_name(group), group) for group in groups.values()]


def _group_name(group: list[TrainableRow]) -> str:
    if len(group) == 1:
        return group[0].module
    numbers = sorted(int(re.findall(r"\d+", row.module)[0]) for row in group)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return re.sub(r"\d+", f"[{spans}]", group[0].module, count=1)


def _print_head(diagnosis: Diagnosis, console: Console) -> None:
    settings, base = diagnosis.settings, diagnosis.base
    new = " with a new PERFT adapter" if diagnosis.kind == "model" and settings else ""
    console.print(Text.assemble((diagnosis.target, "bold"), new), soft_wrap=True)
    if settings:
        sizes = [f"r={settings['r']}"]
        sizes += [f"{key}={settings[key]}" for key in ("num_experts", "top_k") if key in settings]
        console.print(Text(f"adapter: variant {settings['variant']}, {settings['adapter']}, {', '.join(sizes)}"))
    if base is not None:
        where = f"{base.source}, " if diagnosis.kind == "adapter" else ""
        text = f"base model: {where}{base.model_class}, {base.parameters:,} parameters, {base.dtype}"
        console.print(Text(text))


def _print_trainable(diagnosis: Diagnosis, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("modules, and the tensors of each", overflow="fold")
    for heading in ("stored", "active per token"):
        table.add_column(heading, justify="right")
    for name, group in group_rows(diagnosis.rows):
        row = group[0]
        tensors = "".join(f"\n  {tensor} {list(shape)}" for tensor, shape in row.tensors.items())
        table.add_row(Text(name + tensors), f"{row.total:,}", _format_active(row.active))
    if len(diagnosis.rows) > 1:
        table.add_section()
        total, active = diagnosis.adapter_parameters, diagnosis.active_parameters
        table.add_row(f"all {len(diagnosis.rows)} modules", f"{total:,}", _format_active(active))
    _print_title("What would train" if diagnosis.kind == "model" else "What was trained", console)
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
    beside = [f"{name} {list(shape)}" for name, shape in diagnosis.also_trains.items()]
    if beside:
        more = f", and {len(beside) - _BESIDE_SHOWN} more" if len(beside) > _BESIDE_SHOWN else ""
        _print_indented(f"and beside the adapters: {', '.join(beside[:_BESIDE_SHOWN])}{more}", console)
    if diagnosis.share_of_base is not None:
        share = f"{diagnosis.share_of_base:.2%}" if diagnosis.share_of_base >= 5e-5 else "less than 0.01%"
        _print_indented(f"{diagnosis.trainable_parameters:,} parameters, {share} of the base model's", console)


def _format_active(active: int | None) -> str:
    return "unknown" if active is None else f"{active:,}"


def _print_cost(diagnosis: Diagnosis, console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    if diagnosis.file_bytes is not None:
        note = "on disk" if diagnosis.kind == "adapter" else "its tensors, as saved"
        table.add_row("adapter file", format_bytes(diagnosis.file_bytes), note)
    note = f"{TRAINING_BYTES_PER_PARAMETER} bytes per parameter: fp32 weight, gradient, two Adam moments"
    table.add_row("training state", format_bytes(diagnosis.training_bytes), note)
    base = diagnosis.base
    if base is not None:
        quantized = (
            f"; its configuration says {base.quantization}-quantised, which is smaller" if base.quantization else ""
        )
        table.add_row("base weights", format_bytes(base.weight_bytes), f"frozen, in {base.dtype}{quantized}")
    _print_title("What it costs: the parameters' part only, activations not included", console)
    console.print(Padding(table, (0, 0, 0, 2)))


def _print_router(diagnosis: Diagnosis, console: Console) -> None:
    router = diagnosis.router
    if router is None:
        return
    _print_title("How it routes", console)
    for line in router.base_rule.splitlines():
        _print_indented(f"base router: {line}", console)
    resolved = f"normalize_top_k = {router.normalize_top_k} ({router.reason})"
    _print_indented(f"adapters: {router.reason if router.normalize_top_k is None else resolved}", console)


def _print_findings(findings: list[Finding], console: Console) -> None:
    _print_title("What is wrong", console)
    if all(finding.level != "error" for finding in findings):
        _print_indented("nothing" + (", but:" if findings else ""), console)
    for finding in sorted(findings, key=lambda f: f.level):
        style = "bold red" if finding.level == "error" else "bold yellow"
        text = Text.assemble((finding.level, style), f" ({finding.code}): {finding.message}")
        if finding.next_step:
            text.append(f"\nnext: {finding.next_step}")
        console.print(Padding(text, (0, 0, 0, 2), expand=False))


def _print_title(text: str, console: Console) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _print_indented(text: str, console: Console) -> None:
    console.print(Padding(Text(text), (0, 0, 0, 2), expand=False))
