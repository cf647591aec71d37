"""The ``hf-moe`` command: names what `commands` holds. Features load when a command runs; ``--help`` stays quick."""

from typing import Annotated

import typer

import hf_moe_ext
from hf_moe_ext.commands import (
    card,
    compress,
    cost_model,
    delta,
    diagnosis,
    export,
    fold,
    inspect,
    mup,
    pilot,
    plan,
    push,
    run,
    to_dcca,
    traffic,
    upcycle,
)

# Under `recipes/finetune.py` the same settings are written with underscores; both spellings work here.
_UNDERSCORES_TOO = {"token_normalize_func": lambda token: token.replace("_", "-")}
# Options after a program's name are that program's.
_ITS_OWN_OPTIONS = {"ignore_unknown_options": True, "allow_interspersed_args": False}

app = typer.Typer(
    name="hf-moe",
    help="Mixture-of-Experts fine-tuning for the Hugging Face stack.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)


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


# Here in the order of `--help`, which puts groups such as `delta` last.
app.command("inspect", short_help="What the routers do with a text: load, dead and hot experts, drift.")(
    inspect.inspect_routing
)
app.command("env", short_help="Versions and devices, to paste into an issue.")(diagnosis.env)
app.command("doctor", short_help="What would train, what it costs, what is wrong.", context_settings=_UNDERSCORES_TOO)(
    diagnosis.doctor
)
app.command(
    "traffic",
    short_help="Bytes that expert parallelism sends, by formula and measured.",
    context_settings=_UNDERSCORES_TOO,
)(traffic.traffic)
app.command(
    "run", short_help="Run another program with our adapter types known to it.", context_settings=_ITS_OWN_OPTIONS
)(run.run)
app.command("to-dcca", short_help="Convert a Mixtral- or OLMoE-type checkpoint to the DCCA form.")(
    to_dcca.convert_to_dcca
)
app.command("fold", short_help="Fold a µP model into a stock Mixtral or OLMoE checkpoint.")(fold.fold_multipliers)
app.command("coord-check", short_help="Does anything grow with the width? Coordinate check of µP.")(mup.coord_check)
app.command("transfer", short_help="Training arguments of a large model from a tuned small one, by µP.")(
    mup.write_transfer
)
app.command("compress", short_help="Store the experts of an upcycled MoE as one shared base and light deltas.")(
    compress.compress_experts
)
app.command("upcycle", short_help="Make a dense checkpoint a Mixture-of-Experts one with the same logits.")(
    upcycle.upcycle_checkpoint
)
app.command("export", short_help="Write experts that share a base as ordinary ones: a stock checkpoint.")(
    export.export_experts
)
app.command("plan", short_help="How many experts at this budget, on this hardware.")(plan.plan_sparsity)
app.command("pilot", short_help="Compare methods on your own rows; one recommendation.")(pilot.run_pilot_command)
app.command("measure-hardware", short_help="Time this machine; a row for the cost model.")(
    cost_model.measure_hardware_row
)
app.command("calibrate", short_help="Efficiencies of the cost model from a measured run.")(
    cost_model.calibrate_efficiency
)
app.command("card", short_help="Render the card of an adapter or model from what was measured.")(card.write_model_card)
app.command("push", short_help="Push an adapter or model to the Hub, in one commit, with its card.")(push.push_to_hub)
app.add_typer(delta.app)

if __name__ == "__main__":
    app()
