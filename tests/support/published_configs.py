"""Dimensions of published checkpoints, as their config.json files on the Hub have them; only keys that change a count.

Beside each the published round numbers (total, active), from its model card or report.
"""

PUBLISHED = {
    # mistralai/Mixtral-8x7B-v0.1: 46.7B, 12.9B (arXiv 2401.04088)
    "mixtral-8x7b": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 32768, "sliding_window": None,
    },
    # mistralai/Mixtral-8x22B-v0.1: 141B, 39B
    "mixtral-8x22b": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 6144, "intermediate_size": 16384,
        "num_hidden_layers": 56, "num_attention_heads": 48, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 65536, "sliding_window": None,
    },
    # allenai/OLMoE-1B-7B-0924: 6.9B, 1.3B (arXiv 2409.02060)
    "olmoe-1b-7b": {
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "max_position_embeddings": 4096,
    },
    # Qwen/Qwen1.5-MoE-A2.7B: 14.3B, 2.7B
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "decoder_sparse_step": 1, "max_position_embeddings": 8192,
    },
    # Qwen/Qwen2-57B-A14B: 57B, 14B (arXiv 2407.10671)
    "qwen2-57b-a14b": {
        "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "num_experts": 64,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480,
        "decoder_sparse_step": 1, "max_position_embeddings": 131072,
    },
    # Qwen/Qwen3-30B-A3B: 30.5B, 3.3B (arXiv 2505.09388)
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "max_position_embeddings": 40960,
    },
    # Qwen/Qwen3-235B-A22B: 235B, 22B
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "max_position_embeddings": 40960,
    },
    # deepseek-ai/DeepSeek-V2: 236B, 21B (arXiv 2405.04434)
    "deepseek-v2": {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288,
        "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1536,
        "first_k_dense_replace": 1, "max_position_embeddings": 163840,
    },
    # deepseek-ai/DeepSeek-V2-Lite: 15.7B, 2.4B
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512,
        "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1, "max_position_embeddings": 163840,
    },
    # deepseek-ai/DeepSeek-V3: 671B, 37B without the input embedding (arXiv 2412.19437)
    "deepseek-v3": {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3, "max_position_embeddings": 163840,
    },
    # openai/gpt-oss-20b: 20.9B, 3.6B without the input embedding (arXiv 2508.10925)
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "attention_bias": True,
        "max_position_embeddings": 131072,
    },
    # openai/gpt-oss-120b: 116.8B, 5.1B without the input embedding
    "gpt-oss-120b": {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128, "attention_bias": True,
        "max_position_embeddings": 131072,
    },
    # zai-org/GLM-4.5: 355B, 32B (arXiv 2508.06471)
    "glm-4.5": {
        "model_type": "glm4_moe", "vocab_size": 151552, "hidden_size": 5120, "intermediate_size": 12288,
        "num_hidden_layers": 92, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
        "n_routed_experts": 160, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 1536,
        "first_k_dense_replace": 3, "use_qk_norm": True, "attention_bias": True, "max_position_embeddings": 131072,
    },
    # zai-org/GLM-4.5-Air: 106B, 12B
    "glm-4.5-air": {
        "model_type": "glm4_moe", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944,
        "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
        "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1, "use_qk_norm": False, "attention_bias": True, "max_position_embeddings": 131072,
    },
    # ibm-granite/granite-3.0-1b-a400m-base: 1.3B, 400M
    "granite-3.0-1b-a400m": {
        "model_type": "granitemoe", "vocab_size": 49155, "hidden_size": 1024, "intermediate_size": 512,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8, "num_local_experts": 32,
        "num_experts_per_tok": 8, "tie_word_embeddings": True, "max_position_embeddings": 4096,
    },
    # ibm-granite/granite-3.0-3b-a800m-base: 3.4B, 800M
    "granite-3.0-3b-a800m": {
        "model_type": "granitemoe", "vocab_size": 49155, "hidden_size": 1536, "intermediate_size": 512,
        "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8, "num_local_experts": 40,
        "num_experts_per_tok": 8, "tie_word_embeddings": True, "max_position_embeddings": 4096,
    },
}  # fmt: skip

# In thousands of millions: total, active, and whether the published active count has the input embedding in it. Left out
# where the report does not say or the spec gives none.
PUBLISHED_BILLIONS = {
    "mixtral-8x7b": ("46.7", "12.9", True),
    "olmoe-1b-7b": ("6.9", "1.3", True),
    "qwen1.5-moe-a2.7b": ("14.3", "2.7", True),
    "deepseek-v3": ("671", "37", False),
    "gpt-oss-20b": ("20.9", "3.6", False),
    "gpt-oss-120b": ("116.8", "5.1", False),
}
