"""State spaces, linear attention and convolutions, alone or with attention between them."""

from zoo.fields import DENSE_FIRST, EXPERTS, LATENT, LINEAR, ROUTED, TOKENS, base

# Mamba 2 inside a hybrid: 8 heads of 32, together mamba_expand (2) times hidden_size.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16}

RECURRENT = {
    "mamba": (
        "mamba",
        {"vocab_size": 258, "hidden_size": 128, "num_hidden_layers": 3, "state_size": 16},
    ),
    "falcon_mamba": (
        "falcon_mamba",
        {**TOKENS, "hidden_size": 128, "num_hidden_layers": 3, "state_size": 16},
    ),
    # 8 heads of 32: expand (2) times hidden_size.
    "mamba2": (
        "mamba2",
        {
            "vocab_size": 258,
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "state_size": 16,
            "num_heads": 8,
            "head_dim": 32,
            "n_groups": 1,
        },
    ),
    "recurrent_gemma": ("recurrent_gemma", base(lru_width=128, attention_window_size=64)),
    # Attention and Mamba 2 side by side in each layer.
    "falcon_h1": ("falcon_h1", base(mamba_d_ssm=256, mamba_n_groups=1, **MAMBA)),
    "bamba": ("bamba", base("head_dim", attn_layer_indices=[1], **MAMBA)),
    "granitemoehybrid": (
        "granitemoehybrid",
        base(
            "head_dim",
            layer_types=["mamba", "mamba", "attention"],
            shared_intermediate_size=128,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            **MAMBA,
            **EXPERTS,
        ),
    ),
    # Mamba, Mamba with experts, attention, Mamba with experts.
    "jamba": (
        "jamba",
        base(
            "head_dim",
            num_hidden_layers=4,
            attn_layer_period=4,
            attn_layer_offset=2,
            expert_layer_period=2,
            expert_layer_offset=1,
            use_mamba_kernels=False,
            mamba_d_state=16,
            **EXPERTS,
        ),
    ),
    # Every layer is one of Mamba 2 (M), attention (*) and MLP (-).
    "nemotron_h": (
        "nemotron_h",
        base(
            num_hidden_layers=4,
            hybrid_override_pattern="M-*-",
            mamba_num_heads=8,
            mamba_head_dim=32,
            ssm_state_size=16,
            n_groups=1,
        ),
    ),
    # Both hybrid layers share one attention and MLP. Under the name layer_types the list would
    # arrive after the config has counted the hybrid layers of its default.
    "zamba2": (
        "zamba2",
        base(
            "head_dim",
            num_hidden_layers=4,
            num_key_value_heads=4,
            layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
            mamba_d_state=16,
            mamba_ngroups=1,
            n_mamba_heads=8,
            num_mem_blocks=1,
            use_shared_attention_adapter=False,
        ),
    ),
    # intermediate_size as it stands, not two thirds of it rounded up.
    "lfm2": (
        "lfm2",
        base(
            "head_dim",
            layer_types=["conv", "conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
        ),
    ),
    "lfm2_moe": (
        "lfm2_moe",
        base(
            "head_dim",
            layer_types=["conv", "conv", "full_attention"],
            num_dense_layers=1,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
        ),
    ),
    "lfm3": (
        "lfm3",
        base(layer_types=["conv", "sliding_attention", "full_attention"], sliding_window=64),
    ),
    "olmo_hybrid": ("olmo_hybrid", base("head_dim", num_hidden_layers=4, **LINEAR)),
    # Lightning attention in every second layer, in blocks of 32 tokens.
    "minimax": ("minimax", base(num_hidden_layers=4, block_size=32, **EXPERTS)),
    # The number of experts is num_local_experts, here its default of 256.
    "kimi_linear": ("kimi_linear", base("head_dim", **LATENT, **ROUTED, **DENSE_FIRST)),
    # Linear attention twice, then latent attention.
    "bailing_hybrid": (
        "bailing_hybrid",
        base(
            num_local_experts=4,
            num_mtp_layers=0,
            layer_group_size=3,
            **LATENT,
            **ROUTED,
            **DENSE_FIRST,
        ),
    ),
    # Attention after a convolution, a router that is itself an MLP.
    "zaya": (
        "zaya",
        base(
            "intermediate_size",
            num_hidden_layers=4,
            num_experts=4,
            num_experts_per_tok=1,
            moe_intermediate_size=64,
            router_hidden_size=32,
        ),
    ),
}
