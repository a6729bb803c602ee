"""Fields of configs that several architectures share, all of one small size.

The vocabulary is that of the byte tokenizer: 256 bytes, the beginning and the end of a text.
"""

from __future__ import annotations

from typing import Any

TOKENS = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257}

# No padding token: the default one of many architectures is outside so small a vocabulary.
BASE = {
    **TOKENS,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "pad_token_id": None,
}

# Architectures read the number of experts under one name or the other.
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}

# Experts as DeepSeek names them, one of them shared by every token.
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}

# The first layer dense, the others with experts, chosen among all experts at once.
DENSE_FIRST = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}

# Multi-head latent attention: keys and values through a narrow projection, as many as queries. The
# three widths of a head replace head_dim.
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}

# Gated delta nets: linear attention with more value heads than key heads.
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}

# Scalars on the embeddings, logits, residual branches and attention scores. Granite's defaults are
# 1, and would hide a scalar left out.
GRANITE = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
}

# A window shorter than a test's text, and four layers, since many architectures give every fourth
# layer attention without one.
WINDOWED = {"num_hidden_layers": 4, "sliding_window": 64}


def base(*without: str, **fields: Any) -> dict:
    """BASE less the names in `without`, then `fields` over it."""
    return {k: v for k, v in BASE.items() if k not in without} | fields
