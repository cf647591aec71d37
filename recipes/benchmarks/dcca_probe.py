"""How much of a token a linear probe reads from the latent that travels: a latent is not encryption.

A softmax classifier from standardised features to the id of the token at that position, on a trained model of the `loss`
part: from z = descend(x), from the block's full-width input x, and against always naming the most frequent token. Probes
are fitted on some held-out rows and judged on others.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from dcca_loss import DCCA, slug
from dcca_presets import Preset, ProbePreset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_moe_ext  # noqa: F401  # every loader knows our model types after this
from quickstart.corpus import read_corpus
from quickstart.pretrain import cut_blocks


def measure_probe(preset: Preset, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of the probes by layer.

    Raises:
        RuntimeError: the `loss` part has left no trained DCCA model.
    """
    folder = find_model(options.work_dir / "loss", preset.loss.seeds[0])
    if not (folder / "config.json").is_file():
        raise RuntimeError(f"{folder} holds no model: run --part loss first")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = read_corpus(preset.loss.source_dir)
    tokens = [id for m in corpus.held_out for id in [*tokenizer(m.text)["input_ids"], tokenizer.eos_token_id]]
    rows = [row["input_ids"] for row in cut_blocks(tokens, preset.loss.length, tokenizer.eos_token_id)[:-1]]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    probe, wanted = preset.probe, preset.probe.num_train_tokens + preset.probe.num_test_tokens
    chosen = torch.tensor([rows[i] for i in order[: wanted // preset.loss.length + 1]])
    ids = chosen.flatten()
    # The last rows are for judging: no row is on both sides.
    border = min(probe.num_train_tokens, len(ids) * 3 // 4) // preset.loss.length * preset.loss.length
    layers = {}
    for layer, (wide, latent) in collect(model, chosen).items():
        layers[layer] = {
            name: fit_probe(features, ids, border, model.config.vocab_size, probe)
            for name, features in (("latent", latent), ("full_width", wide))
        }
        print(f"probe: {layer}: {layers[layer]}", flush=True)
    most = ids[:border].mode().values
    return {
        "model": folder.name,
        "latent_size": model.config.moe_latent_size,
        "hidden_size": model.config.hidden_size,
        "vocab_size": model.config.vocab_size,
        "train_tokens": border,
        "test_tokens": len(ids) - border,
        "most_frequent_token": (ids[border:] == most).float().mean().item(),
        "uniform_chance": 1 / model.config.vocab_size,
        "layers": layers,
    }


def find_model(work_dir: Path, seed: int) -> Path:
    """Folder of the finished DCCA run of a seed."""
    for folder in sorted(work_dir.glob(f"final-{slug(DCCA)}-[0-9]*-{seed}")):
        metrics = folder / "metrics.json"
        if metrics.is_file() and json.loads(metrics.read_text(encoding="utf-8"))["model"]["moe_latent_size"]:
            return folder
    return work_dir / f"final-{slug(DCCA)}-{seed}"


@torch.no_grad()
def collect(model: Any, rows: Tensor, batch_size: int = 16) -> dict[str, tuple[Tensor, Tensor]]:
    """Per layer the block's input [tokens, hidden] and the latent [tokens, latent].

    Args:
        model: With a DCCA block in every layer.
        rows: Token ids [rows, length].
        batch_size: Rows at a time.
    """
    kept: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):
        wide, latent = kept.setdefault(str(number), ([], []))

        def keep(_: Any, inputs: tuple[Tensor], output: Tensor, wide: Any = wide, latent: Any = latent) -> None:
            wide.append(inputs[0])
            latent.append(output)

        hooks.append(layer.mlp.descend.register_forward_hook(keep))
    for part in rows.split(batch_size):
        model(input_ids=part, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return {name: (torch.cat(wide), torch.cat(latent)) for name, (wide, latent) in kept.items()}


def fit_probe(features: Tensor, ids: Tensor, border: int, num_classes: int, preset: ProbePreset) -> float:
    """Accuracy on the tokens from `border` on of a linear softmax probe fitted on those before.

    Args:
        features: [tokens, width].
        ids: Token ids [tokens].
        border: First token to judge on.
        num_classes: Vocabulary.
        preset: Epochs, batch, learning rate.
    """
    mean, std = features[:border].mean(0), features[:border].std(0)
    features = (features - mean) / (std + 1e-6)
    torch.manual_seed(0)
    probe = torch.nn.Linear(features.shape[1], num_classes)
    steps = max(1, preset.num_epochs * border // preset.batch_size)
    optimizer = torch.optim.Adam(probe.parameters(), lr=preset.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(0, border, (preset.batch_size,))
        loss = torch.nn.functional.cross_entropy(probe(features[chosen]), ids[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = [(probe(part).argmax(-1) == want) for part, want in
                 zip(features[border:].split(4096), ids[border:].split(4096), strict=True)]  # fmt: skip
    return torch.cat(right).float().mean().item()
