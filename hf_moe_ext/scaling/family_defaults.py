"""Defaults of the families' configuration classes (Transformers 5.23): a config.json may leave out what equals them.

A key without a default must be given. Keys that do not change a count are not here.
"""

from typing import Any

from hf_moe_ext.scaling.ext_config import EXT_DEFAULTS

_LLAMA = {"num_key_value_heads": None, "tie_word_embeddings": False, "head_dim": None, "attention_bias": False}
_MLA = {
    "tie_word_embeddings": False, "attention_bias": False, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
MIXTRAL = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 131072, "num_experts_per_tok": 2, "num_local_experts": 8,
    "sliding_window": None, "tie_word_embeddings": False, "head_dim": None, "num_key_value_heads": 8,
}  # fmt: skip
OLMOE = {
    "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 16, "max_position_embeddings": 4096, "num_experts_per_tok": 8, "num_experts": 64, **_LLAMA,
}  # fmt: skip
QWEN3_MOE = {
    **_LLAMA, "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 32768, "decoder_sparse_step": 1,
    "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128, "mlp_only_layers": None,
    "use_sliding_window": False, "sliding_window": 4096,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen2_moe": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 32768,
        "decoder_sparse_step": 1, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4, "num_experts": 60, "mlp_only_layers": None, "qkv_bias": True, "layer_types": None,
        "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "tie_word_embeddings": False,
        "head_dim": None,
    },
    "qwen3_moe": QWEN3_MOE,
    "deepseek_v2": {
        **_MLA, "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 2048, "first_k_dense_replace": 0,
        "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407, "mlp_bias": False,
    },
    "deepseek_v3": {
        **_MLA, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "max_position_embeddings": 4096, "first_k_dense_replace": 3,
        "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048, "num_experts_per_tok": 8,
    },
    "gpt_oss": {
        **_LLAMA, "num_hidden_layers": 36, "num_local_experts": 128, "vocab_size": 201088, "hidden_size": 2880,
        "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
        "sliding_window": 128, "layer_types": None, "max_position_embeddings": 131072, "num_experts_per_tok": 4,
        "attention_bias": True,
    },
    "glm4_moe": {
        **_LLAMA, "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
        "num_attention_heads": 96, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_routed_experts": 128,
        "first_k_dense_replace": 1, "use_qk_norm": False,
    },
    "granitemoe": {
        **_LLAMA, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 2048, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "mixtral_ext": {**MIXTRAL, **EXT_DEFAULTS},
    "olmoe_ext": {**OLMOE, **EXT_DEFAULTS},
    "qwen3_moe_ext": {**QWEN3_MOE, **EXT_DEFAULTS},
}  # fmt: skip
