"""Two makers' decoders, dense and with experts: Qwen and Gemma."""

from zoo.fields import EXPERTS, LINEAR, WINDOWED, base

QWEN = {
    "qwen2": ("qwen2", base("head_dim")),
    "qwen2_moe": (
        "qwen2_moe",
        base("head_dim", shared_expert_intermediate_size=128, **EXPERTS),
    ),
    # The heads together are wider than hidden_size.
    "qwen3": ("qwen3", base(head_dim=48)),
    "qwen3_moe": ("qwen3_moe", base(**EXPERTS)),
    # Every fourth layer has full attention, so four layers show both kinds.
    "qwen3_next": (
        "qwen3_next",
        base(num_hidden_layers=4, shared_expert_intermediate_size=128, **LINEAR, **EXPERTS),
    ),
    "qwen3_5_text": ("qwen3_5_text", base(num_hidden_layers=4, **LINEAR)),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        base(num_hidden_layers=4, shared_expert_intermediate_size=128, **LINEAR, **EXPERTS),
    ),
    # Two residual streams, a table of hashed n-grams in the first layer, and full attention that
    # sees the 32 best tokens, in blocks of 4.
    "qwen4_exp_text": (
        "qwen4_exp_text",
        base(
            "intermediate_size",
            num_hidden_layers=4,
            shared_expert_intermediate_size=64,
            hc_count=2,
            hc_lowrank=16,
            ple_layer_ids=[1],
            heads_per_ngram=2,
            ngram_vocab_size_base=64,
            split_ngram_parts=1,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=32,
            indexer_budget=32,
            indexer_compress_ratio=4,
            **LINEAR,
            **EXPERTS,
        ),
    ),
}

GEMMA = {
    "gemma": ("gemma", base()),
    "gemma2": ("gemma2", base(query_pre_attn_scalar=32, sliding_window=64)),
    # Every sixth layer has full attention.
    "gemma3_text": (
        "gemma3_text",
        base(query_pre_attn_scalar=32, sliding_window=64, num_hidden_layers=6),
    ),
    # A list per layer where others have one number. No layer borrows another's keys and values.
    "gemma3n_text": (
        "gemma3n_text",
        base(
            **WINDOWED,
            vocab_size_per_layer_input=258,
            hidden_size_per_layer_input=32,
            laurel_rank=16,
            num_kv_shared_layers=0,
            activation_sparsity_pattern=[0.0] * 4,
            intermediate_size=[256] * 4,
        ),
    ),
    # The only large one: its table of per-layer embeddings keeps the default 262144 rows, 1 GiB.
    "gemma4_text": ("gemma4_text", base(**WINDOWED)),
    # As the 26B one: experts beside the MLP, no per-layer embeddings, keys that serve as values in
    # the layers with full attention.
    "gemma4_moe_text": (
        "gemma4_text",
        base(
            **WINDOWED,
            hidden_size_per_layer_input=0,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=64,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
        ),
    ),
    "gemma4_unified_text": ("gemma4_unified_text", base(**WINDOWED)),
    "vaultgemma": ("vaultgemma", base(query_pre_attn_scalar=32, sliding_window=64)),
}
