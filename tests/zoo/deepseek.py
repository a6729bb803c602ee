"""Mixtures of experts under DeepSeek's names, many with latent attention."""

from zoo.fields import DENSE_FIRST, LATENT, ROUTED, WINDOWED, base

# The small attention that picks which tokens the full one sees: 32 of them, so that a test's text
# is long enough for it to leave some out.
INDEXER = {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 32}

DEEPSEEK_LIKE = {
    "deepseek_v2": ("deepseek_v2", base("head_dim", **LATENT, **ROUTED, **DENSE_FIRST)),
    "deepseek_v3": ("deepseek_v3", base("head_dim", **LATENT, **ROUTED, **DENSE_FIRST)),
    "deepseek_v32": (
        "deepseek_v32",
        base("head_dim", **LATENT, **ROUTED, **DENSE_FIRST, **INDEXER),
    ),
    # One key and value head, groups of output projections and two residual streams. Each kind of
    # attention (compress_ratios: none in a window, 4 and 128 tokens in one) and of router (in the
    # first layer, a table from the token).
    "deepseek_v4": (
        "deepseek_v4",
        base(
            "intermediate_size",
            **WINDOWED,
            num_key_value_heads=1,
            q_lora_rank=64,
            o_groups=2,
            o_lora_rank=32,
            hc_mult=2,
            compress_ratios=[0, 4, 128, 4],
            num_hash_layers=1,
            num_nextn_predict_layers=0,
            **ROUTED,
            **INDEXER,
        ),
    ),
    "glm4_moe": ("glm4_moe", base(use_qk_norm=True, **ROUTED, **DENSE_FIRST)),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        base("head_dim", n_group=1, topk_group=1, **LATENT, **ROUTED),
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        base("head_dim", **LATENT, **ROUTED, **DENSE_FIRST, **INDEXER),
    ),
    # Two residual streams.
    "hy_v4": (
        "hy_v4",
        base(head_dim=48, hc_mult=2, **LATENT, **ROUTED, **DENSE_FIRST, **INDEXER),
    ),
    "solar_open": ("solar_open", base(**ROUTED)),
    "dots1": (
        "dots1",
        base("head_dim", sliding_window=64, first_k_dense_replace=1, **ROUTED),
    ),
    # Values narrower than keys.
    "mimo_v2_flash": (
        "mimo_v2_flash",
        base(
            v_head_dim=24,
            sliding_window=64,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
        ),
    ),
    # num_layers counts blocks of two attentions and two MLPs with experts beside them; 2 of the 6
    # experts hand their input on. head_dim is the rotary part alone.
    "longcat_flash": (
        "longcat_flash",
        base(
            "num_hidden_layers",
            "intermediate_size",
            num_layers=2,
            head_dim=16,
            ffn_hidden_size=256,
            expert_ffn_hidden_size=64,
            n_routed_experts=4,
            zero_expert_num=2,
            moe_topk=2,
            **LATENT,
        ),
    ),
}
