"""Mixtures of experts, each with a router and shared experts of its own kind."""

from zoo.fields import EXPERTS, GRANITE, TOKENS, WINDOWED, base

MIXTURES = {
    "mixtral": ("mixtral", base(**EXPERTS)),
    "phimoe": ("phimoe", base("head_dim", **EXPERTS)),
    "olmoe": ("olmoe", base("head_dim", **EXPERTS)),
    "flex_olmo": ("flex_olmo", base("head_dim", **EXPERTS)),
    "granitemoe": ("granitemoe", base("head_dim", **GRANITE, **EXPERTS)),
    "granitemoeshared": (
        "granitemoeshared",
        base("head_dim", shared_intermediate_size=64, **GRANITE, **EXPERTS),
    ),
    "minimax_m2": ("minimax_m2", base(rotary_dim=16, **EXPERTS)),
    # The first layer dense with full attention, the others with experts and attention to the best
    # blocks of tokens. intermediate_size is an expert's.
    "minimax_m3_vl_text": (
        "minimax_m3_vl_text",
        base(
            intermediate_size=64,
            dense_intermediate_size=256,
            shared_intermediate_size=64,
            num_local_experts=4,
            num_experts_per_tok=2,
            rotary_dim=16,
            mlp_layer_types=["dense", "sparse", "sparse"],
            layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
            index_n_heads=2,
            index_head_dim=32,
            index_block_size=16,
            index_topk_blocks=2,
        ),
    ),
    # A learned sink in each head's softmax, biases in the experts.
    "gpt_oss": (
        "gpt_oss",
        base(**WINDOWED, num_local_experts=4, num_experts_per_tok=2),
    ),
    # Experts in every second layer, a shared one beside them.
    "llama4_text": (
        "llama4_text",
        base(
            num_hidden_layers=4,
            intermediate_size_mlp=256,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            moe_layers=None,
        ),
    ),
    "cohere2_moe": (
        "cohere2_moe",
        base(**WINDOWED, num_experts=4, num_experts_per_tok=2, num_shared_experts=1),
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        base(
            "head_dim",
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            moe_intermediate_size=64,
        ),
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", base(num_experts=4, moe_topk=2)),
    "hy_v3": (
        "hy_v3",
        base(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    ),
    "afmoe": (
        "afmoe",
        base(
            **WINDOWED,
            num_dense_layers=1,
            num_experts=4,
            num_experts_per_tok=2,
            num_shared_experts=1,
            moe_intermediate_size=64,
        ),
    ),
    "exaone_moe": (
        "exaone_moe",
        base(
            **WINDOWED,
            first_k_dense_replace=1,
            num_experts=4,
            num_experts_per_tok=2,
            num_shared_experts=1,
            moe_intermediate_size=64,
        ),
    ),
    # A layer with a window has more heads than a layer without.
    "laguna": (
        "laguna",
        base(
            **WINDOWED,
            layer_types=["full_attention"] + ["sliding_attention"] * 3,
            num_attention_heads_per_layer=[4, 6, 6, 6],
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
        ),
    ),
    "dbrx": (
        "dbrx",
        {
            **TOKENS,
            "d_model": 128,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 2048,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": 128,
                "ffn_hidden_size": 64,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
    ),
    # Attention has experts too: kv_channels is the width of a head, and the number of query heads
    # follows from the experts per token.
    "jetmoe": (
        "jetmoe",
        base(
            "head_dim",
            "num_attention_heads",
            kv_channels=32,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
    ),
}
