"""The ``hf-moe`` command. Every command imports its feature inside, so that ``--help`` and ``--version`` stay quick."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import hf_moe_ext
from hf_moe_ext.commands.plan import plan_sparsity
from hf_moe_ext.commands.upcycle import upcycle_checkpoint

# Under `recipes/finetune.py` the same settings are written with underscores; both spellings work here.
_CONTEXT = {"token_normalize_func": lambda token: token.replace("_", "-")}

app = typer.Typer(
    name="hf-moe",
    help="Mixture-of-Experts fine-tuning for the Hugging Face stack.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf_moe_ext {hf_moe_ext.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Mixture-of-Experts fine-tuning for the Hugging Face stack."""


@app.command(short_help="Versions and devices, to paste into an issue.")
def env(as_json: Json = False) -> None:
    """Versions, devices and whether they are the tested ones: text to paste into an issue."""
    from hf_moe_ext.environment import read_environment

    environment = read_environment()
    typer.echo(json.dumps(environment.as_dict(), indent=2) if as_json else environment.as_text())


@app.command(short_help="What would train, what it costs, what is wrong.", context_settings=_CONTEXT)
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
    """
    from hf_moe_ext.perft.doctor import TargetError, diagnose

    options = _given_options(context, besides=("target", "base_model", "as_json"))
    try:
        diagnosis = diagnose(target, options, base_model)
    except TargetError as error:
        typer.echo(f"hf-moe doctor: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(diagnosis.as_dict(), indent=2))
    else:
        from rich.console import Console

        from hf_moe_ext.perft.doctor.tables import print_diagnosis

        print_diagnosis(diagnosis, Console(highlight=False))
    raise typer.Exit(0 if diagnosis.ok else 1)


@app.command(short_help="Bytes that expert parallelism sends, by formula and measured.", context_settings=_CONTEXT)
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
    """
    from hf_moe_ext.dcca.traffic import TrafficError, compute_traffic, read_layers
    from hf_moe_ext.scaling.exchange import IMPLEMENTATIONS

    element_bytes = {"float32": 4, "float64": 8}.get(dtype, 2)
    wanted = IMPLEMENTATIONS if implementation is None else (implementation,)
    try:
        result = compute_traffic(read_layers(config), ep, tokens, wanted, element_bytes, recomputed, measured)
    except TrafficError as error:
        typer.echo(f"hf-moe traffic: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        from rich.console import Console

        from hf_moe_ext.dcca.traffic_table import print_traffic

        print_traffic(result, Console(highlight=False))


@app.command(
    short_help="Run another program with our adapter types known to it.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def run(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="A program and its arguments.")],
) -> None:
    """Run another program with PERFT adapters known to every Python in it, its children too.

    Examples: hf-moe run -- transformers serve FOLDER; hf-moe run -- lm_eval --model hf --model_args
    pretrained=MODEL,peft=ADAPTER --tasks TASK; hf-moe run -- python script.py; hf-moe run -- accelerate launch
    script.py. Exit code: the program's own; 2 if there is no such program.
    """
    from hf_moe_ext.launch import CommandError, run_program

    try:
        run_program(command)
    except CommandError as error:
        typer.echo(f"hf-moe run: {error}", err=True)
        raise typer.Exit(2) from error


@app.command("to-dcca", short_help="Convert a Mixtral- or OLMoE-type checkpoint to the DCCA form.")
def convert_to_dcca(
    model: Annotated[str, typer.Argument(help="Folder or Hub id: mixtral, olmoe, mixtral_ext or olmoe_ext.")],
    output: Annotated[str, typer.Option(help="Folder to write.")],
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
    overwrite: Annotated[bool, typer.Option(help="Replace an existing output folder.")] = False,
    device: Annotated[str | None, typer.Option(help="Where to compute. [default: CUDA if there is one]")] = None,
    as_json: Json = False,
) -> None:
    """Convert a pretrained checkpoint, or chosen layers of it, to DCCA blocks fitted on a calibration text.

    Prints the layers' errors and the perplexity before and after. Exit code: 0 written, 2 refused.
    """
    from hf_moe_ext.convert import to_dcca
    from hf_moe_ext.convert.conversion_plan import parse_layers
    from hf_moe_ext.convert.distillation import DistillationSettings

    steps = DistillationSettings(
        distill_steps, distill_learning_rate, distill_batch_rows, distill_output_loss_coef, distill_router
    )
    try:
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
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"hf-moe to-dcca: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        return
    from rich.console import Console

    from hf_moe_ext.convert.conversion_report import print_report

    print_report(report, Console(highlight=False))


@app.command("fold", short_help="Fold a µP model into a stock Mixtral or OLMoE checkpoint.")
def fold_multipliers(
    source: Annotated[str, typer.Argument(help="Folder or Hub id: mixtral_ext or olmoe_ext, every block standard.")],
    output: Annotated[str, typer.Option(help="Folder to write.")],
    untie: Annotated[
        bool, typer.Option("--untie", help="Give a model whose head is its embedding a head of its own.")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Compare logits of source and result; loads both, one after the other.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the factors; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    as_json: Json = False,
) -> None:
    """Multiply the forward multipliers of a model into its weights: equal logits, and no trace of this package.

    Equal to the last bit where every factor is a power of two, else up to rounding. Exit code: 0 written, 2 refused.
    """
    from hf_moe_ext.convert import fold

    try:
        report = fold(source, output, untie=untie, verify=verify, dry_run=dry_run, overwrite=overwrite)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        typer.echo(f"hf-moe fold: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else report.as_text())


@app.command("coord-check", short_help="Does anything grow with the width? Coordinate check of µP.")
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
    """
    from hf_moe_ext.mup.config_file import read_config
    from hf_moe_ext.mup.coord_check import check_coordinates
    from hf_moe_ext.mup.coord_input import parse_numbers
    from hf_moe_ext.mup.coord_report import as_json as to_json
    from hf_moe_ext.mup.coord_report import print_check, require_matplotlib, write_json, write_png
    from hf_moe_ext.mup.output_file import check_output_file

    try:
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
    except (ValueError, TypeError, OSError, RuntimeError) as error:  # RuntimeError: out of memory, above all
        typer.echo(f"hf-moe coord-check: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(to_json(check))
    else:
        from rich.console import Console

        print_check(check, Console(highlight=False))
    raise typer.Exit(0 if check.ok else 1)


@app.command("transfer", short_help="Training arguments of a large model from a tuned small one, by µP.")
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
    """
    from hf_moe_ext.mup.small_run import TransferError
    from hf_moe_ext.mup.transfer_report import format_report, write_transfer_file

    given = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    changes = {"max_steps": max_steps, "per_device_train_batch_size": batch_size, "max_length": max_length}
    try:
        result = write_transfer_file(
            source, target, output, arguments_file=arguments, given=given, changes=changes, mode=mode, num_trials=trials,
            overwrite=overwrite,
        )  # fmt: skip
    except (TransferError, OSError) as error:
        typer.echo(f"hf-moe transfer: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(json.dumps(result.as_dict(), indent=2) if as_json else format_report(result, output))


@app.command("compress", short_help="Store the experts of an upcycled MoE as one shared base and light deltas.")
def compress_experts(
    moe: Annotated[
        str, typer.Argument(help="Folder or Hub id: mixtral, olmoe, qwen3_moe, or *_ext of standard blocks.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write.")],
    parent: Annotated[str | None, typer.Option(help="The dense model whose FFN the experts were copied from.")] = None,
    base: Annotated[
        Literal["parent", "mean", "least_squares"], typer.Option(help="What the experts share; parent needs --parent.")
    ] = "parent",
    encode: Annotated[
        Literal["random_drop", "magnitude_drop", "svd", "quantize"], typer.Option(help="How deltas are stored.")
    ] = "random_drop",
    drop_rate: Annotated[float | None, typer.Option(help="Share of a delta that is dropped. [default: 0.6]")] = None,
    rank: Annotated[int | None, typer.Option(help="Of svd. [default: an eighth of the smaller dimension]")] = None,
    bits: Annotated[
        int | None, typer.Option(help="Of quantize (default 4), or of a drop's values. [default: as they are]")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Entries that share a scale.")] = 128,
    seed: Annotated[int, typer.Option(help="Of random positions.")] = 0,
    target_bytes: Annotated[int | None, typer.Option(help="Size of the files; chooses a rate for each matrix.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Relative output error of any matrix; chooses a rate for each.")
    ] = None,
    min_cosine: Annotated[float, typer.Option(help="Refuse experts less close to the base than this.")] = 0.9,
    force: Annotated[bool, typer.Option("--force", help="Go on with experts that are further away.")] = False,
    export: Annotated[Literal["stock"] | None, typer.Option(help="Write ordinary experts instead.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text (JSONL with text and slice, text file, folder) to measure perplexity on.")
    ] = None,
    max_loss: Annotated[float | None, typer.Option(help="Refuse a larger rise of the loss, in nats per token.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, choose, print; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    as_json: Json = False,
) -> None:
    """Compress a trained Mixture of Experts that was made from a dense model, and tell how close it stays.

    Exit code: 0 written, 2 refused.
    """
    from hf_moe_ext.convert import compress

    try:
        report = compress(
            moe, output, parent=parent, base=base, encode=encode, drop_rate=drop_rate, rank=rank, bits=bits,
            group_size=group_size, seed=seed, target_bytes=target_bytes, max_error=max_error, min_cosine=min_cosine,
            force=force, export=export, calibration=calibration, max_loss=max_loss, dry_run=dry_run, overwrite=overwrite,
        )  # fmt: skip
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"hf-moe compress: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else report.as_text())


delta_app = typer.Typer(
    name="delta", help="Updates of a checkpoint as small files beside an untouched base.", no_args_is_help=True
)
app.add_typer(delta_app, short_help="Updates of a checkpoint as small files beside an untouched base.")
_Output = Annotated[str, typer.Option("--output", "-o", help="Folder to write.")]


@delta_app.command("diff", short_help="Write what changed between two checkpoints of one model.")
def diff_delta(
    base: Annotated[str, typer.Argument(help="Folder of the checkpoint that stays.")],
    new: Annotated[str, typer.Argument(help="Folder of the other.")],
    output: _Output,
    encode: Annotated[
        Literal["random_drop", "magnitude_drop", "svd", "quantize"] | None,
        typer.Option(help="Store changed experts' matrices with loss. [default: bit for bit]"),
    ] = None,
    drop_rate: Annotated[float | None, typer.Option(help="Of a drop. [default: 0.6]")] = None,
    rank: Annotated[int | None, typer.Option(help="Of svd.")] = None,
    bits: Annotated[int | None, typer.Option(help="Of quantize, or of a drop's values.")] = None,
    group_size: Annotated[int, typer.Option(help="Entries that share a scale.")] = 128,
    as_json: Json = False,
) -> None:
    """Write a delta folder: the tensors, and the single experts of stacks, that changed. Exit code: 0 written, 2 refused."""
    from hf_moe_ext.convert.delta_apply import diff_checkpoints
    from hf_moe_ext.convert.delta_encoding import Encoding

    def work() -> Any:
        if encode is None and (drop_rate, rank, bits) != (None, None, None):
            raise ValueError("--drop-rate, --rank and --bits are of a lossy delta; name its --encode")
        encoding = None if encode is None else Encoding(encode, drop_rate, rank, bits, group_size)
        return diff_checkpoints(base, new, output, encoding=encoding)

    _run_delta("diff", work, as_json)


@delta_app.command("apply", short_help="Base and delta to the new checkpoint.")
def apply_delta_folder(
    base: Annotated[str, typer.Argument(help="Folder of the base; not touched.")],
    delta: Annotated[str, typer.Argument(help="Delta folder.")],
    output: _Output,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    as_json: Json = False,
) -> None:
    """Write the new checkpoint; a base that is not the delta's is refused by hash. Exit code: 0 written, 2 refused."""
    from hf_moe_ext.convert.delta_apply import apply_delta

    _run_delta("apply", lambda: apply_delta(base, delta, output, overwrite=overwrite), as_json)


@delta_app.command("revert", short_help="New checkpoint and delta back to the base, to the byte.")
def revert_delta_folder(
    new: Annotated[str, typer.Argument(help="Folder of the new checkpoint; not touched.")],
    delta: Annotated[str, typer.Argument(help="Delta folder, without loss.")],
    output: _Output,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    as_json: Json = False,
) -> None:
    """Write the base back, byte for byte. Exit code: 0 written, 2 refused."""
    from hf_moe_ext.convert.delta_apply import revert_delta

    _run_delta("revert", lambda: revert_delta(new, delta, output, overwrite=overwrite), as_json)


def _run_delta(command: str, work: Callable[[], Any], as_json: bool) -> None:
    try:
        report = work()
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"hf-moe delta {command}: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else report.as_text())


@app.command("measure-hardware", short_help="Time this machine; a row for the cost model.")
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
    """
    from dataclasses import asdict

    from hf_moe_ext.hardware_timing import is_first_rank, measure_hardware

    try:
        row = measure_hardware(name, device=device, dtype=dtype, size="small" if small else "full", output=output)
    except (ValueError, OSError) as error:
        typer.echo(f"hf-moe measure-hardware: {error}", err=True)
        raise typer.Exit(2) from error
    if is_first_rank():
        from hf_moe_ext.scaling.hardware import format_hardware

        typer.echo(json.dumps(asdict(row), indent=2) if as_json else format_hardware(row), nl=as_json)


@app.command("calibrate", short_help="Efficiencies of the cost model from a measured run.")
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
    """
    from dataclasses import asdict

    from hf_moe_ext.scaling.calibrate import calibrate, read_measured
    from hf_moe_ext.scaling.hardware import find_hardware
    from hf_moe_ext.scaling.layout import Layout
    from hf_moe_ext.scaling.memory import TrainingStep
    from hf_moe_ext.scaling.operations import Tokens
    from hf_moe_ext.scaling.roofline import training_time
    from hf_moe_ext.scaling.shape import MoeShape

    try:
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
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"hf-moe calibrate: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(text)


def _given_options(context: typer.Context, besides: tuple[str, ...]) -> dict[str, Any]:
    """The options the user wrote; those left out keep the default of the class they are passed to."""
    given = {name: value for name, value in context.params.items() if name not in besides and value is not None}
    # An option that may be repeated is an empty sequence when it was not given at all.
    return {n: list(v) if isinstance(v, tuple | list) else v for n, v in given.items() if v not in ((), [])}


app.command("upcycle", short_help="Make a dense checkpoint a Mixture-of-Experts one with the same logits.")(
    upcycle_checkpoint
)

app.command("plan", short_help="How many experts at this budget, on this hardware.")(plan_sparsity)

if __name__ == "__main__":
    app()
