"""Times of a training step and of its all-to-alls, on loopback and over slow links; of prompt and token; and bytes.

Standard and DCCA hold the same embeddings, attention and router, so the same tokens go to the same experts: what differs
between the arms of a round is the width of what travels and what the experts do with it.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from dcca_presets import StepPreset
from network_namespaces import find_obstacle, make_lab
from rank_processes import run_job
from step_cost import profile_operations, quartiles, ratio_quartiles, time_steps, training_step
from transformers import AutoModelForCausalLM
from transformers.distributed.expert_parallel import EPImplementationInterface

from hf_moe_ext import MixtralExtConfig
from hf_moe_ext.scaling.exchange import Exchange, Implementation, expect_sent, layer_bytes

STANDARD, DCCA = "standard", "dcca"
STOCK: Implementation = "all_to_all"
OURS: Implementation = "latent_all_to_all"
# Forward and backward, out and back.
EXCHANGES_PER_STEP = 4
FLOAT_BYTES = 4


def measure_step(preset: StepPreset, options: argparse.Namespace) -> dict[str, Any]:
    """Step and exchange on one process and on several over loopback.

    Returns:
        By number of ranks: seconds, ratios with their quartiles, bytes; for one process a profile of both blocks.
    """
    if preset.device != "cpu":
        return {"1": measure_on_device(preset)}
    results = {}
    with built_models(preset) as folders:
        for num_ranks in preset.num_ranks:
            arms = list_arms(folders, options.implementations)
            if num_ranks == 1:  # nothing is exchanged
                arms = {block: {"model": folder, "implementation": None} for block, folder in folders.items()}
            print(f"step: {num_ranks} rank(s), {', '.join(arms)}", flush=True)
            job = {
                "kind": "train", "arms": arms, "batch_size": preset.batch_size, "length": preset.length,
                "rounds": preset.rounds, "steps": preset.steps, "profile": num_ranks == 1,
            }  # fmt: skip
            results[str(num_ranks)] = summarize_step(run_job(job, num_ranks))
    return results


def measure_link(preset: StepPreset, options: argparse.Namespace) -> dict[str, Any]:
    """The same over links between network namespaces, as slow as the wanted share of all-to-all asks for.

    Returns:
        Rate, shares, times, the speed-up of the whole step and what Amdahl's law gives; or `skipped`, the reason.
    """
    obstacle = find_obstacle() if preset.link_ranks else "the preset has no ranks to link"
    if obstacle is not None:
        print(f"link: skipped: {obstacle}", flush=True)
        return {"skipped": obstacle}
    with built_models(preset) as folders, make_lab(preset.link_ranks) as lab:
        arms = list_arms(folders, options.implementations)
        base = {"kind": "train", "batch_size": preset.link_batch_size, "length": preset.length}
        full = name_arm(STANDARD, STOCK)
        pilot = run_job({**base, "arms": {full: arms[full]}, "rounds": 2, "steps": 2}, preset.link_ranks, lab)
        rate = choose_rate(pilot["seconds"][full], pilot["facts"][full]["wire_bytes"], preset)
        lab.limit(rate)
        print(f"link: {preset.link_ranks} ranks at {rate / 1e6:.2f} MB/s, {', '.join(arms)}", flush=True)
        job = {**base, "arms": arms, "rounds": preset.link_rounds, "steps": 1}
        result = summarize_step(run_job(job, preset.link_ranks, lab, timeout_s=3000))
    width_ratio = preset.latent_size / preset.hidden_size
    share = result["arms"][full]["exchange_share"]
    result |= {
        "num_ranks": preset.link_ranks,
        "tokens_per_rank": preset.link_batch_size * preset.length,
        "rate_bytes_per_s": rate,
        "unlimited": {"step_s": min(pilot["seconds"][full]["step"]), "exchange_s": min(pilot["seconds"][full]["exchange"]),
                      "wire_bytes": pilot["facts"][full]["wire_bytes"]},
        "full_width_share": share,
        "amdahl": 1 / (1 - share + share * width_ratio),
    }  # fmt: skip
    return result


def measure_decode(preset: StepPreset, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the prompt and of a token after it, by number of ranks."""
    results = {}
    with built_models(preset) as folders:
        for num_ranks in preset.decode_ranks:
            arms = list_arms(folders, options.implementations)
            print(f"decode: {num_ranks} ranks, {', '.join(arms)}", flush=True)
            job = {
                "kind": "decode", "arms": arms, "batch_size": preset.decode_batch_size,
                "length": preset.prompt_length, "rounds": preset.rounds, "new_tokens": preset.new_tokens,
            }  # fmt: skip
            seconds = run_job(job, num_ranks)["seconds"]
            results[str(num_ranks)] = {
                "arms": {
                    name: {f"{what}_s": quartiles(values) for what, values in found.items()}
                    for name, found in seconds.items()
                },
                "ratios": {
                    f"{what}: {mine} / {theirs}": ratio_quartiles(seconds[mine][what], seconds[theirs][what])
                    for mine, theirs in list_pairs(seconds)
                    for what in ("prefill", "token")
                },
            }
    return results


def measure_bytes(preset: StepPreset, step: dict[str, Any] | None) -> dict[str, Any]:
    """Bytes one rank sends in a step's exchanges: by formula, and as the `step` part counted them."""
    results: dict[str, Any] = {}
    for num_ranks in (n for n in preset.num_ranks if n > 1):
        measured = (step or {}).get(str(num_ranks), {}).get("arms", {})
        results[str(num_ranks)] = {
            name_arm(block, implementation): {
                "formula": formula_bytes(preset, block, implementation, num_ranks),
                "measured": {
                    key: value
                    for key, value in measured.get(name_arm(block, implementation), {}).items()
                    if key in ("payload_bytes", "metadata_bytes")
                },
            }
            for block in (STANDARD, DCCA)
            for implementation in (STOCK, OURS)
        }
    return results


def formula_bytes(preset: StepPreset, block: str, implementation: Implementation, num_ranks: int) -> dict[str, float]:
    """Expected payload and metadata of one rank and step, uniform routing."""
    width = preset.latent_size if block == DCCA else preset.hidden_size
    exchange = Exchange(width, preset.num_experts, preset.top_k, num_ranks, element_bytes=FLOAT_BYTES)
    sent = expect_sent(exchange, implementation, preset.batch_size * preset.length)
    each = layer_bytes(exchange, implementation, sent)
    layers = preset.num_hidden_layers
    return {"payload_bytes": each.payload * layers, "metadata_bytes": each.metadata * layers}


def choose_rate(seconds: dict[str, list[float]], wire_bytes: int, preset: StepPreset) -> float:
    """Bytes per second at which a full-width step spends the wanted share in all-to-all.

    With A bytes of exchange, O other bytes (FSDP's) and c seconds of computing, the share is A/r / (c + (A + O)/r).

    Raises:
        RuntimeError: the other bytes alone are too many for that share.
    """
    tokens = preset.link_batch_size * preset.length
    off_rank = (preset.link_ranks - 1) / preset.link_ranks
    rows = tokens * preset.top_k * off_rank * preset.num_hidden_layers
    exchanged = EXCHANGES_PER_STEP * rows * preset.hidden_size * FLOAT_BYTES
    computing = max(min(seconds["step"]) - min(seconds["exchange"]), 1e-3)
    room = exchanged / preset.link_share - max(wire_bytes, exchanged)
    if room <= 0:
        raise RuntimeError(
            f"FSDP sends {wire_bytes - exchanged:.0f} bytes beside {exchanged:.0f} of all-to-all: no rate makes "
            f"all-to-all {preset.link_share:.0%} of the step; more rows per rank would"
        )
    return room / computing


def measure_on_device(preset: StepPreset) -> dict[str, Any]:
    """Both blocks on one GPU in this process, in turns."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"step": [], "exchange": []} for name in (STANDARD, DCCA)}
    profiles = {}
    with built_models(preset) as folders:
        models: dict[str, Any] = {
            name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for name, folder in folders.items()
        }
        for model in models.values():
            model.to(preset.device)
        ids = torch.randint(3, preset.vocab_size, (preset.batch_size, preset.length), device=preset.device)
        for number in range(preset.rounds + 1):
            for name in (STANDARD, DCCA) if number % 2 else (DCCA, STANDARD):
                with training_step(models[name], {"input_ids": ids, "labels": ids}) as (step, _):
                    times = [wall for wall, _ in time_steps(step, preset.device, 1, preset.steps)]
                    if number:
                        seconds[name]["step"].append(statistics.median(times))
                        seconds[name]["exchange"].append(0.0)
                    else:
                        profiles[name] = profile_operations(step, preset.device)
    return summarize_step({"seconds": seconds, "facts": {}, "profiles": profiles})


@contextmanager
def built_models(preset: StepPreset) -> Iterator[dict[str, str]]:
    """Both models in a folder of their own, with everything but the experts in common; gone afterwards."""
    with tempfile.TemporaryDirectory() as root:
        standard = build_model(preset, STANDARD)
        dcca = build_model(preset, DCCA)
        common = {name: tensor for name, tensor in standard.state_dict().items() if ".mlp.experts." not in name}
        dcca.load_state_dict(common, strict=False)
        folders = {}
        for name, model in ((STANDARD, standard), (DCCA, dcca)):
            folders[name] = str(Path(root, name))
            model.save_pretrained(folders[name])
        del standard, dcca, common, model
        yield folders


def build_model(preset: StepPreset, block: str) -> Any:
    """A model of the preset's shape with random weights."""
    torch.manual_seed(0)
    keys: dict[str, Any] = {"moe_latent_size": preset.latent_size} if block == DCCA else {}
    config = MixtralExtConfig(
        vocab_size=preset.vocab_size,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_hidden_layers=preset.num_hidden_layers,
        num_attention_heads=preset.num_attention_heads,
        num_key_value_heads=1,
        head_dim=preset.head_dim,
        num_local_experts=preset.num_experts,
        num_experts_per_tok=preset.top_k,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        moe_block=block,
        **keys,
    )
    return AutoModelForCausalLM.from_config(config)


def list_arms(folders: dict[str, str], implementations: list[str]) -> dict[str, dict[str, Any]]:
    """Arm -> job's description; an implementation that is not registered is left out, with a word."""
    known = [name for name in implementations if name in EPImplementationInterface().valid_keys()]
    for name in sorted(set(implementations) - set(known)):
        print(f"ep_implementation {name} is not registered with this installation: left out", flush=True)
    return {
        name_arm(block, implementation): {"model": folders[block], "implementation": implementation}
        for implementation in known
        for block in (STANDARD, DCCA)
    }


def name_arm(block: str, implementation: str) -> str:
    """As it stands in tables."""
    return f"{block}, {implementation}"


def list_pairs(names: dict[str, Any]) -> list[tuple[str, str]]:
    """Which arm is divided by which: DCCA by standard, ours by the stock exchange, and DCCA with ours by plain standard."""
    wanted = [
        (name_arm(DCCA, STOCK), name_arm(STANDARD, STOCK)),
        (name_arm(STANDARD, OURS), name_arm(STANDARD, STOCK)),
        (name_arm(DCCA, OURS), name_arm(DCCA, STOCK)),
        (name_arm(DCCA, OURS), name_arm(STANDARD, STOCK)),
    ]
    return [(mine, theirs) for mine, theirs in wanted if mine in names and theirs in names]


def summarize_step(result: dict[str, Any]) -> dict[str, Any]:
    """Medians and quartiles of times, and of the ratios within each round."""
    seconds = result["seconds"]
    arms = {}
    for name, found in seconds.items():
        step, exchange = statistics.median(found["step"]), statistics.median(found["exchange"])
        arms[name] = {
            "step_s": quartiles(found["step"]),
            "exchange_s": quartiles(found["exchange"]),
            "exchange_share": exchange / step,
            **result["facts"].get(name, {}),
        }
    ratios = {}
    for mine, theirs in list_pairs(seconds) or ([(DCCA, STANDARD)] if DCCA in seconds else []):
        ratios[f"step: {mine} / {theirs}"] = ratio_quartiles(seconds[mine]["step"], seconds[theirs]["step"])
        if all(seconds[theirs]["exchange"]):
            ratios[f"exchange: {mine} / {theirs}"] = ratio_quartiles(
                seconds[mine]["exchange"], seconds[theirs]["exchange"]
            )
    return {"rounds": len(next(iter(seconds.values()))["step"]), "arms": arms, "ratios": ratios,
            "profiles": keep_largest(result.get("profiles", {}))}  # fmt: skip


def keep_largest(profiles: dict[str, dict[str, float]], count: int = 12) -> dict[str, dict[str, float]]:
    """Of each profile the operations that take most time in any of them, milliseconds."""
    largest: Callable[[str], float] = lambda key: -max(times.get(key, 0.0) for times in profiles.values())  # noqa: E731
    keys = sorted({key for times in profiles.values() for key in times}, key=largest)[:count]
    return {name: {key: round(times.get(key, 0.0), 3) for key in keys} for name, times in profiles.items()}
