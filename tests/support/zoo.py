"""One tiny random model per MoE family of Transformers 5.23, and batches to run through it.

Read from the modelling files of Transformers 5.23. "block" is the module that holds the router and the experts; all
experts modules here are its child `experts` with `forward(hidden_states, index, weights)`.

| name           | block                       | router: attribute, rule for the weights                     | sum to 1 decided by        |
|----------------|-----------------------------|-------------------------------------------------------------|----------------------------|
| mixtral        | MixtralSparseMoeBlock       | gate: softmax (float32), top-k, divided by its sum          | always                     |
| olmoe          | OlmoeSparseMoeBlock         | gate: softmax, top-k                                        | norm_topk_prob (False)     |
| flex_olmo      | FlexOlmoSparseMoeBlock      | gate: softmax, top-k                                        | norm_topk_prob (False)     |
| qwen2_moe      | Qwen2MoeSparseMoeBlock      | gate: softmax, top-k; + gated shared expert                 | norm_topk_prob (False)     |
| qwen3_moe      | Qwen3MoeSparseMoeBlock      | gate: softmax, top-k                                        | norm_topk_prob (False)     |
| deepseek_v3    | DeepseekV3MoE               | gate: sigmoid; groups; top-k of score + bias; weight = score, times routed_scaling_factor; + shared | norm_topk_prob (True) |
| gpt_oss        | GptOssMLP, returns a tuple  | router: top-k of the logits (with bias), then softmax of k  | always                     |
| glm4_moe       | Glm4MoeMoE                  | gate: as deepseek_v3                                        | norm_topk_prob (True)      |
| granitemoe     | GraniteMoeMoE, `block_sparse_moe` | router: top-k of the logits, then softmax of k        | always                     |
| ernie4_5_moe   | Ernie4_5_MoeSparseMoeBlock  | gate: softmax; top-k of probability + bias; divided by max(sum, moe_norm_min); + shared | always |
| phimoe         | PhimoeSparseMoeBlock        | router: sparsemixer; choice n is softmax over the logits near the n-th largest, so each weight is in (0, 1] by itself; random in training | never |
| minimax_m2     | MiniMaxM2SparseMoeBlock     | gate: sigmoid; top-k of score + bias; divided by its sum    | always                     |
| nemotron_h     | NemotronHMoE, `mixer`       | gate: as deepseek_v3; `moe_latent_size` narrows what the experts see | norm_topk_prob (True) |
| hunyuan_v1_moe | HunYuanMoEV1Moe             | gate (weight in `gate.wg`): softmax, top-k, divided by its sum; + shared | always        |
| exaone_moe     | ExaoneMoeSparseMoEBlock     | gate: as deepseek_v3                                        | norm_topk_prob (True)      |

"always" and "never" hold before any scaling factor. Where it is scaled, the scaling is inside the router, so the
weights that the experts receive sum to routed_scaling_factor.

A dense layer stands first wherever the configuration allows one (qwen2_moe, qwen3_moe, deepseek_v3, glm4_moe,
ernie4_5_moe, exaone_moe; nemotron_h mixes mamba, attention and dense layers in between); the other eight have none.

What cannot be served is in `REFUSED`: Llama 4 scales the input of its experts and gives them no index, JetMoE keeps
its experts as two linear stacks, Llama is dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 96
PAD_ID = 0

# Two key-value heads under four query heads, so that a mix-up of the two shows.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # The stock 0.02 makes a model this narrow almost linear; this is about 1 / sqrt(hidden_size).
    "initializer_range": 0.15,
    "pad_token_id": PAD_ID,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
_MLA: dict[str, Any] = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_QWEN: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "mlp_only_layers": [0]}


def _family(config_class: str, num_hidden_layers: int | None = 2, **settings: Any) -> Callable[..., PretrainedConfig]:
    """A function that builds a tiny configuration; its keyword arguments replace the settings given here."""

    def config(**overrides: Any) -> PretrainedConfig:
        layers = {} if num_hidden_layers is None else {"num_hidden_layers": num_hidden_layers}
        return getattr(transformers, config_class)(**{**COMMON, **layers, **settings, **overrides})

    return config


FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "mixtral": _family("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "olmoe": _family("OlmoeConfig", num_experts=8, num_experts_per_tok=3),
    "flex_olmo": _family("FlexOlmoConfig", num_experts=5, num_experts_per_tok=2),
    "qwen2_moe": _family("Qwen2MoeConfig", 3, num_experts=8, shared_expert_intermediate_size=24, **_QWEN),
    "qwen3_moe": _family("Qwen3MoeConfig", 3, num_experts=8, head_dim=8, **_QWEN),
    "deepseek_v3": _family("DeepseekV3Config", 3, **_DEEPSEEK, **_MLA),
    "gpt_oss": _family(
        "GptOssConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=16,
        # Its default is YaRN from 4096 to 131072 positions, which warns on a model of 64 positions.
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "glm4_moe": _family("Glm4MoeConfig", 3, head_dim=8, **_DEEPSEEK),
    "granitemoe": _family("GraniteMoeConfig", num_local_experts=4, num_experts_per_tok=2),
    "ernie4_5_moe": _family(
        "Ernie4_5_MoeConfig",
        3,
        moe_num_experts=6,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_intermediate_size=24,
        moe_layer_start_index=1,
    ),
    # The stock 0.01 leaves nearly every softmax of sparsemixer a single candidate: weight 1 and no gradient.
    "phimoe": _family("PhimoeConfig", num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.4),
    "minimax_m2": _family("MiniMaxM2Config", num_local_experts=8, num_experts_per_tok=3, head_dim=8),
    "nemotron_h": _family(
        "NemotronHConfig",
        None,  # the pattern says how many
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "moe"],
        head_dim=8,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=8,
        moe_shared_expert_intermediate_size=24,
        **{key: value for key, value in _DEEPSEEK.items() if key != "first_k_dense_replace"},
    ),
    "hunyuan_v1_moe": _family("HunYuanMoEV1Config", num_experts=4, moe_topk=2, head_dim=8),
    "exaone_moe": _family(
        "ExaoneMoeConfig",
        3,
        num_experts=8,
        num_shared_experts=1,
        sliding_window=16,
        **{key: value for key, value in _DEEPSEEK.items() if key not in ("n_routed_experts", "n_shared_experts")},
    ),
}

REFUSED: dict[str, Callable[..., PretrainedConfig]] = {
    "llama4": _family(
        "Llama4TextConfig", num_local_experts=4, head_dim=8, intermediate_size_mlp=48, attention_chunk_size=32
    ),
    "jetmoe": _family("JetMoeConfig", num_local_experts=4, num_experts_per_tok=2, kv_channels=8),
    "llama": _family("LlamaConfig"),
}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A tiny random model of a family, in eval mode, the same for the same arguments.

    Args:
        name: A key of `FAMILIES` or `REFUSED`.
        seed: Seed of the weights; the global generator is left as it was.
        dtype: Of all floating-point parameters and buffers.
        **overrides: Configuration values, and `experts_implementation` or `attn_implementation`. The experts run
            "batched_mm" in float64 unless told otherwise, because `grouped_mm`, the default, has no float64.

    Returns:
        The model. Its routers are drawn anew, see `spread_routers`. In float64 some stock arithmetic stays float32
        (most norms, the router's softmax or sigmoid, NemotronH's logits); it rounds alike in two equal computations.
    """
    kwargs = {key: overrides.pop(key) for key in ("experts_implementation", "attn_implementation") if key in overrides}
    if dtype == torch.float64:
        kwargs.setdefault("experts_implementation", "batched_mm")
    config = {**FAMILIES, **REFUSED}[name](**overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, **kwargs)
        spread_routers(model)
        # A padding embedding of zeros gives router logits of zero, ties on every padding token, and a gradient that
        # grows 300-fold in each norm.
        nn.init.normal_(model.get_input_embeddings().weight[PAD_ID], std=config.initializer_range)
    return model.to(dtype).eval()


def routers(model: nn.Module) -> Iterator[Tensor]:
    """The weight [num_experts, hidden] of every router that stands beside an `experts` module, in model order."""
    for block in model.modules():
        children = dict(block.named_children())
        router = children.get("gate", children.get("router"))
        if "experts" in children and router is not None:
            yield router.wg.weight if hasattr(router, "wg") else router.weight


def spread_routers(model: nn.Module, logit_std: float = 2.0) -> None:
    """Draw the router weights anew so that the logits of a normed input have about this standard deviation.

    As initialised they are so small (or zero) that all experts score alike; then a rounding error could swap two of
    them and a comparison of two ways to compute the same model would fail for no fault of either.
    """
    for weight in routers(model):
        nn.init.normal_(weight, std=logit_std / weight.shape[1] ** 0.5)


def random_batch(
    vocab: int = VOCAB_SIZE, batch: int = 3, length: int = 12, pad_id: int = PAD_ID, seed: int = 0
) -> dict[str, Tensor]:
    """A batch of random tokens: row 0 padded on the left, row 1 on the right, row 2 not at all, and so on in turn.

    Args:
        vocab: Ids are drawn from 3..vocab-1, so never a special token of these models.
        batch: Rows.
        length: Columns, at least 2; up to half of a padded row is padding.
        pad_id: Id of the padding.
        seed: Seed of ids and lengths.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each [batch, length], int64. Labels are -100 on padding, and on the
        first token after left padding, whose prediction would come from a padding token.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, vocab, (batch, length), generator=generator)
    attention_mask = torch.ones(batch, length, dtype=torch.long)
    first = torch.zeros(batch, length, dtype=torch.bool)
    for row in range(batch):
        padding = int(torch.randint(1, length // 2 + 1, (), generator=generator))
        if row % 3 == 0:
            attention_mask[row, :padding] = 0
            first[row, padding] = True
        elif row % 3 == 1:
            attention_mask[row, length - padding :] = 0
    input_ids = input_ids.masked_fill(attention_mask == 0, pad_id)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill((attention_mask == 0) | first, -100),
    }
