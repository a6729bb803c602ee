"""Tiny decoders of many architectures with random weights: what each architecture's modules look
like and how they are called, at around a million parameters. Nothing is downloaded.

The vocabulary is that of the byte tokenizer: 256 bytes, the beginning and the end of a text.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

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

# Sizes under the names that GPT-2 gave them. One key and value head per query head.
GPT2 = {**TOKENS, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 2048}

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

# The small attention that picks which tokens the full one sees: 32 of them, so that a test's text
# is long enough for it to leave some out.
INDEXER = {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 32}

# Gated delta nets: linear attention with more value heads than key heads.
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}

# Mamba 2 inside a hybrid: 8 heads of 32, together mamba_expand (2) times hidden_size.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16}

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


def _base(*without: str, **fields: Any) -> dict:
    """BASE less the names in `without`, then `fields` over it."""
    return {k: v for k, v in BASE.items() if k not in without} | fields


LLAMA_LIKE = {
    "llama": ("llama", _base()),
    "internlm3": ("internlm3", _base()),
    "mistral": ("mistral", _base(sliding_window=64)),
    "ministral": ("ministral", _base(sliding_window=64)),
    "ministral3": ("ministral3", _base()),
    "seed_oss": ("seed_oss", _base()),
    "helium": ("helium", _base()),
    # No gate: two matrices in an MLP.
    "arcee": ("arcee", _base()),
    # The difference of two attentions.
    "diffllama": ("diffllama", _base()),
    "doge": ("doge", _base("head_dim")),
    # Its rotary embedding stretches from 8192 positions, so it needs more than those.
    "cwm": ("cwm", _base(**WINDOWED, max_position_embeddings=16384)),
    "ernie4_5": ("ernie4_5", _base()),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _base()),
    "exaone4": ("exaone4", _base(**WINDOWED)),
    # Every fourth layer has no rotary embedding.
    "smollm3": ("smollm3", _base("head_dim", num_hidden_layers=4)),
    "apertus": ("apertus", _base("head_dim")),
    "nanochat": ("nanochat", _base("head_dim")),
    "bitnet": ("bitnet", _base("head_dim")),
    "nemotron": ("nemotron", _base()),
    "granite": ("granite", _base("head_dim", **GRANITE)),
    "minicpm3": ("minicpm3", _base("head_dim", **LATENT)),
    "youtu": ("youtu", _base("head_dim", **LATENT)),
}

QWEN = {
    "qwen2": ("qwen2", _base("head_dim")),
    "qwen2_moe": (
        "qwen2_moe",
        _base("head_dim", shared_expert_intermediate_size=128, **EXPERTS),
    ),
    # The heads together are wider than hidden_size.
    "qwen3": ("qwen3", _base(head_dim=48)),
    "qwen3_moe": ("qwen3_moe", _base(**EXPERTS)),
    # Every fourth layer has full attention, so four layers show both kinds.
    "qwen3_next": (
        "qwen3_next",
        _base(num_hidden_layers=4, shared_expert_intermediate_size=128, **LINEAR, **EXPERTS),
    ),
    "qwen3_5_text": ("qwen3_5_text", _base(num_hidden_layers=4, **LINEAR)),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        _base(num_hidden_layers=4, shared_expert_intermediate_size=128, **LINEAR, **EXPERTS),
    ),
    # Two residual streams, a table of hashed n-grams in the first layer, and full attention that
    # sees the 32 best tokens, in blocks of 4.
    "qwen4_exp_text": (
        "qwen4_exp_text",
        _base(
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
    "gemma": ("gemma", _base()),
    "gemma2": ("gemma2", _base(query_pre_attn_scalar=32, sliding_window=64)),
    # Every sixth layer has full attention.
    "gemma3_text": (
        "gemma3_text",
        _base(query_pre_attn_scalar=32, sliding_window=64, num_hidden_layers=6),
    ),
    # A list per layer where others have one number. No layer borrows another's keys and values.
    "gemma3n_text": (
        "gemma3n_text",
        _base(
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
    "gemma4_text": ("gemma4_text", _base(**WINDOWED)),
    # As the 26B one: experts beside the MLP, no per-layer embeddings, keys that serve as values in
    # the layers with full attention.
    "gemma4_moe_text": (
        "gemma4_text",
        _base(
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
    "gemma4_unified_text": ("gemma4_unified_text", _base(**WINDOWED)),
    "vaultgemma": ("vaultgemma", _base(query_pre_attn_scalar=32, sliding_window=64)),
}

OTHER_DENSE = {
    "phi": ("phi", _base("head_dim", partial_rotary_factor=0.5)),
    # One matrix for queries, keys and values, one for gate and up.
    "phi3": ("phi3", _base("head_dim")),
    "olmo": ("olmo", _base("head_dim")),
    "olmo2": ("olmo2", _base("head_dim")),
    "olmo3": ("olmo3", _base("head_dim", **WINDOWED)),
    "stablelm": ("stablelm", _base("head_dim", partial_rotary_factor=0.25)),
    "cohere": ("cohere", _base("head_dim")),
    "cohere2": ("cohere2", _base(**WINDOWED)),
    "glm": ("glm", _base()),
    "glm4": ("glm4", _base()),
    "starcoder2": ("starcoder2", _base("head_dim")),
    "persimmon": ("persimmon", _base("head_dim", "num_key_value_heads")),
}

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
    "gpt_neox": ("gpt_neox", _base("head_dim", "num_key_value_heads", rotary_pct=0.25)),
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

MIXTURES = {
    "mixtral": ("mixtral", _base(**EXPERTS)),
    "phimoe": ("phimoe", _base("head_dim", **EXPERTS)),
    "olmoe": ("olmoe", _base("head_dim", **EXPERTS)),
    "flex_olmo": ("flex_olmo", _base("head_dim", **EXPERTS)),
    "granitemoe": ("granitemoe", _base("head_dim", **GRANITE, **EXPERTS)),
    "granitemoeshared": (
        "granitemoeshared",
        _base("head_dim", shared_intermediate_size=64, **GRANITE, **EXPERTS),
    ),
    "minimax_m2": ("minimax_m2", _base(rotary_dim=16, **EXPERTS)),
    # The first layer dense with full attention, the others with experts and attention to the best
    # blocks of tokens. intermediate_size is an expert's.
    "minimax_m3_vl_text": (
        "minimax_m3_vl_text",
        _base(
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
        _base(**WINDOWED, num_local_experts=4, num_experts_per_tok=2),
    ),
    # Experts in every second layer, a shared one beside them.
    "llama4_text": (
        "llama4_text",
        _base(
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
        _base(**WINDOWED, num_experts=4, num_experts_per_tok=2, num_shared_experts=1),
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        _base(
            "head_dim",
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            moe_intermediate_size=64,
        ),
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", _base(num_experts=4, moe_topk=2)),
    "hy_v3": (
        "hy_v3",
        _base(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    ),
    "afmoe": (
        "afmoe",
        _base(
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
        _base(
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
        _base(
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
        _base(
            "head_dim",
            "num_attention_heads",
            kv_channels=32,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
    ),
}

DEEPSEEK_LIKE = {
    "deepseek_v2": ("deepseek_v2", _base("head_dim", **LATENT, **ROUTED, **DENSE_FIRST)),
    "deepseek_v3": ("deepseek_v3", _base("head_dim", **LATENT, **ROUTED, **DENSE_FIRST)),
    "deepseek_v32": (
        "deepseek_v32",
        _base("head_dim", **LATENT, **ROUTED, **DENSE_FIRST, **INDEXER),
    ),
    # One key and value head, groups of output projections and two residual streams. Each kind of
    # attention (compress_ratios: none in a window, 4 and 128 tokens in one) and of router (in the
    # first layer, a table from the token).
    "deepseek_v4": (
        "deepseek_v4",
        _base(
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
    "glm4_moe": ("glm4_moe", _base(use_qk_norm=True, **ROUTED, **DENSE_FIRST)),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        _base("head_dim", n_group=1, topk_group=1, **LATENT, **ROUTED),
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        _base("head_dim", **LATENT, **ROUTED, **DENSE_FIRST, **INDEXER),
    ),
    # Two residual streams.
    "hy_v4": (
        "hy_v4",
        _base(head_dim=48, hc_mult=2, **LATENT, **ROUTED, **DENSE_FIRST, **INDEXER),
    ),
    "solar_open": ("solar_open", _base(**ROUTED)),
    "dots1": (
        "dots1",
        _base("head_dim", sliding_window=64, first_k_dense_replace=1, **ROUTED),
    ),
    # Values narrower than keys.
    "mimo_v2_flash": (
        "mimo_v2_flash",
        _base(
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
        _base(
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
    "recurrent_gemma": ("recurrent_gemma", _base(lru_width=128, attention_window_size=64)),
    # Attention and Mamba 2 side by side in each layer.
    "falcon_h1": ("falcon_h1", _base(mamba_d_ssm=256, mamba_n_groups=1, **MAMBA)),
    "bamba": ("bamba", _base("head_dim", attn_layer_indices=[1], **MAMBA)),
    "granitemoehybrid": (
        "granitemoehybrid",
        _base(
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
        _base(
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
        _base(
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
        _base(
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
        _base(
            "head_dim",
            layer_types=["conv", "conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
        ),
    ),
    "lfm2_moe": (
        "lfm2_moe",
        _base(
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
        _base(layer_types=["conv", "sliding_attention", "full_attention"], sliding_window=64),
    ),
    "olmo_hybrid": ("olmo_hybrid", _base("head_dim", num_hidden_layers=4, **LINEAR)),
    # Lightning attention in every second layer, in blocks of 32 tokens.
    "minimax": ("minimax", _base(num_hidden_layers=4, block_size=32, **EXPERTS)),
    # The number of experts is num_local_experts, here its default of 256.
    "kimi_linear": ("kimi_linear", _base("head_dim", **LATENT, **ROUTED, **DENSE_FIRST)),
    # Linear attention twice, then latent attention.
    "bailing_hybrid": (
        "bailing_hybrid",
        _base(
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
        _base(
            "intermediate_size",
            num_hidden_layers=4,
            num_experts=4,
            num_experts_per_tok=1,
            moe_intermediate_size=64,
            router_hidden_size=32,
        ),
    ),
}

# Name -> model_type and the fields of its config.
ZOO: dict[str, tuple[str, dict]] = {
    **LLAMA_LIKE,
    **QWEN,
    **GEMMA,
    **OTHER_DENSE,
    **OLDER,
    **MIXTURES,
    **DEEPSEEK_LIKE,
    **RECURRENT,
}


def config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The config of ZOO's `name`, `overrides` in place of its fields."""
    kind, fields = ZOO[name]
    # A config keeps and edits the lists and dicts it is given.
    return AutoConfig.for_model(kind, **copy.deepcopy(fields | overrides))


def make(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """ZOO's `name` with random weights, in float32 and eval mode, its cache off. The same seed
    makes the same model, and torch's own random numbers go on as if nothing had been drawn.

    ids [batch, tokens] int64, each under 258 -> logits [batch, tokens, 258] float32.
    """
    made = config(name, **overrides)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the accelerators too, which the fork leaves alone.
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    _randomize(model, torch.Generator().manual_seed(seed))
    model.config.use_cache = False
    return model.eval()


@torch.no_grad()
def _randomize(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Norms that differ from 1, biases that differ from 0 and matrices all of one scale. Vectors of
    other names, as a state space's decays, keep the values of their architecture."""
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim <= 1 and name.endswith("weight") and _of_norm(name):
            parameter.add_(0.2 * noise)
        elif parameter.ndim <= 2 and name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        elif parameter.ndim >= 2:
            parameter.copy_(0.05 * noise)
    # The experts of a token, where a table has them: each once.
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("tid2eid"):
            order = torch.rand(len(buffer), model.config.n_routed_experts, generator=generator)
            buffer.copy_(order.argsort(dim=-1)[:, : buffer.shape[1]])


def _of_norm(name: str) -> bool:
    return "norm" in name or ".ln" in name or "ln_" in name
