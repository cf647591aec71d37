"""``hf-moe inspect``."""

import json
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_moe_ext.commands.conventions import Json, refusal_of

_NEEDED_BY = {
    "--data": ("datasets",),
    "--html": ("jinja2", "matplotlib"),
    "--log": ("pyarrow",),
}


def inspect_routing(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id; safetensors only.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Text: .jsonl, .json, .csv, .tsv, .parquet or .txt, also .gz, or a data set of the Hub. Columns: text | "
            "prompt, completion | instruction, [input,] output | messages.",
        ),
    ],
    adapter: Annotated[str | None, typer.Option(metavar="A", help="PEFT adapter: folder or Hub id.")] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="OLD.json", help="Compare with what --output wrote then.")
    ] = None,
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Report, one file.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="To compare with later.")
    ] = None,
    slice_column: Annotated[
        str | None, typer.Option(metavar="C", help="Column that names slices. [default: slice, where there is one]")
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Rows are drawn at random up to so many.")] = 20_000,
    max_length: Annotated[int, typer.Option(metavar="N", help="Longest row in tokens; its end is cut.")] = 1024,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Rows of a forward pass.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the rows drawn, and of --sample-rate.")] = 0,
    device: Annotated[str | None, typer.Option(help="As cpu or cuda:0. [default: a GPU, where there is one]")] = None,
    log: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write which experts each token took, as parquet.")
    ] = None,
    show_text: Annotated[bool, typer.Option("--show-text", help="With token texts and ids in the log.")] = False,
    sample_rate: Annotated[float, typer.Option(metavar="F", help="Share of the tokens in the log.")] = 1.0,
    max_load: Annotated[float, typer.Option(help="Allowed: change of any router's load, total variation.")] = 0.1,
    max_kl: Annotated[float, typer.Option(help="Allowed: divergence of any router's load, nats.")] = 0.05,
    max_loss: Annotated[float, typer.Option(help="Allowed: rise of the loss, all or a slice, nats per token.")] = 0.05,
) -> None:
    """What the routers of a Mixture-of-Experts model do with a text: load, dead and hot experts, the worst first.

    Example: hf-moe inspect allenai/OLMoE-1B-7B-0924 --data held_out.jsonl --html routing.html --output monday.json

    A week later: hf-moe inspect MODEL --data new.jsonl --against monday.json. Exit code: 0 told, 1 past one of the --max
    limits with --against, 2 bad usage.
    """
    with refusal_of("inspect", on_one_line=True):
        _check_options(html, output, log, show_text, sample_rate, batch_size)
        from hf_moe_ext.audit.comparison import ComparisonLimits, compare
        from hf_moe_ext.audit.inspection import inspect_model, read_inspection
        from hf_moe_ext.audit.model_source import load_model
        from hf_moe_ext.audit.report import format_text
        from hf_moe_ext.audit.text_batches import read_examples

        limits = ComparisonLimits(load=max_load, kl=max_kl, loss=max_loss)
        old = None if against is None else read_inspection(against)
        loaded, tokenizer, facts = load_model(model, adapter, device)
        max_length = min(max_length, _context_length(loaded, max_length))
        text = read_examples(
            data, tokenizer, slice_column=slice_column, max_tokens=max_tokens, max_length=max_length, seed=seed
        )
        with _open_log(log, tokenizer if show_text else None, sample_rate, seed) as listener:
            found = inspect_model(
                loaded, text, facts, batch_size=batch_size, pad_id=tokenizer.eos_token_id, listener=listener
            )
            # Inside: a comparison that is refused leaves no log either.
            comparison = None if old is None else compare(old, found, limits)
            told = _as_dict(found, comparison)
            page = None
            if html is not None:
                from hf_moe_ext.audit.report import render_html

                page = render_html(found, comparison, old)
        if output is not None:
            _write(output, json.dumps(found.as_dict(), indent=2) + "\n")
        if html is not None and page is not None:
            _write(html, page)
    typer.echo(json.dumps(told, indent=2) if as_json else format_text(found, comparison))
    raise typer.Exit(1 if comparison is not None and comparison.exceeded else 0)


def _check_options(
    html: Path | None, output: Path | None, log: Path | None, show_text: bool, sample_rate: float, batch_size: int
) -> None:
    """Refuse what can be refused before anything is loaded."""
    from hf_moe_ext.mup.output_file import check_output_file

    given = {"--data": True, "--html": html is not None, "--log": log is not None}
    for option, wanted in given.items():
        missing = [name for name in _NEEDED_BY[option] if wanted and find_spec(name) is None]
        if missing:
            raise ValueError(f"{option} needs {' and '.join(missing)}: pip install 'hf_moe_ext[audit]'")
    for option, path in (("--html", html), ("--output", output)):
        if path is not None:
            check_output_file(option, path)
    if html is not None and html == output:
        raise ValueError(f"--html and --output are both {html}; give two names")
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    if log is None:
        if show_text or sample_rate != 1.0:
            raise ValueError("--show-text and --sample-rate are about the log; give --log FOLDER too")
        return
    from hf_moe_ext.audit.log_writing import check_log_folder

    check_log_folder(log)
    if not 0 < sample_rate <= 1:
        raise ValueError(f"--sample-rate must be above 0 and at most 1, got {sample_rate}")


def _write(path: Path, text: str) -> None:
    from hf_moe_ext.mup.output_file import write_whole

    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _open_log(folder: Path | None, tokenizer: Any, sample_rate: float, seed: int) -> Any:
    if folder is None:
        return nullcontext()
    from hf_moe_ext.audit.log import AuditLogWriter

    decode = None if tokenizer is None else lambda token: tokenizer.decode([token])
    return AuditLogWriter(folder, decode=decode, sample_rate=sample_rate, seed=seed)


def _context_length(model: Any, default: int) -> int:
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 1 else default


def _as_dict(found: Any, comparison: Any) -> dict[str, Any]:
    from hf_moe_ext.audit.findings import find_all

    told = found.as_dict() | {"findings": [one.as_dict() for one in find_all(found)]}
    return told if comparison is None else told | {"comparison": comparison.as_dict()}
