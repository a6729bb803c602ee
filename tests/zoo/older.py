"""Older decoders, most with LayerNorm, biases and sizes under names of their own."""

from zoo.fields import TOKENS, base

# Sizes under the names that GPT-2 gave them. One key and value head per query head.
GPT2 = {**TOKENS, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 2048}

OLDER = {
    "gpt2": ("gpt2", {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "gptj": ("gptj", {**GPT2, "rotary_dim": 16}),
    "codegen": ("codegen", {**GPT2, "rotary_dim": 16}),
    # The kinds of attention in turn, each pair once.
    "gpt_neo": (
        "gpt_neo",
        {
            **TOKENS,
            "hidden_size": 128,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 64,
            "max_position_embeddings": 2048,
        },
    ),
    "gpt_neox": ("gpt_neox", base("head_dim", "num_key_value_heads", rotary_pct=0.25)),
    "opt": (
        "opt",
        {
            **TOKENS,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 2048,
            "pad_token_id": 1,
            "dropout": 0.0,
        },
    ),
    "biogpt": (
        "biogpt",
        {
            **TOKENS,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "pad_token_id": 1,
        },
    ),
    "xglm": (
        "xglm",
        {
            **TOKENS,
            "d_model": 128,
            "ffn_dim": 256,
            "num_layers": 3,
            "attention_heads": 4,
            "max_position_embeddings": 2048,
            "pad_token_id": 1,
            "dropout": 0.0,
        },
    ),
    # As the 40B one: two norms, groups of queries.
    "falcon": (
        "falcon",
        {
            **TOKENS,
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
    ),
    # As the 7B one: one norm for attention and MLP, one key and value head.
    "falcon_7b": (
        "falcon",
        {
            **TOKENS,
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
            "bias": False,
        },
    ),
    "bloom": (
        "bloom",
        {**TOKENS, "hidden_size": 128, "n_layer": 3, "n_head": 4, "pad_token_id": None},
    ),
    "mpt": (
        "mpt",
        {"vocab_size": 258, "d_model": 128, "n_layers": 3, "n_heads": 4, "max_seq_len": 2048},
    ),
}
