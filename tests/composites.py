"""Tiny models that see or hear beside a text decoder, with random weights. Nothing is downloaded.

Each is a text decoder of the zoo's size, a tower of two layers, and what stands between them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel
from zoo.fields import BASE, EXPERTS, LINEAR

# A tower with its sizes under the names of SigLIP and CLIP.
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}

# One with the names of Qwen's, which gives what is as wide as the decoder.
QWEN2 = {"depth": 2, "num_heads": 4, "patch_size": 14}
QWEN3 = {
    **QWEN2,
    "hidden_size": 64,
    "out_hidden_size": 128,
    "intermediate_size": 128,
    "num_position_embeddings": 16,
}

# Positions on three axes: time, height and width.
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}

# Tokens that stand for what is seen.
SEEN = {
    "image_token_id": 250,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}


def _text(kind: str, **fields: Any) -> dict:
    return {**BASE, "model_type": kind, **fields}


COMPOSITES: dict[str, dict] = {
    # Norms behind the blocks, and windows shorter than a text.
    "gemma3": {
        "text_config": _text("gemma3_text", sliding_window=64, layer_types=None),
        "vision_config": {**TOWER, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 250,
        "boi_token_index": 251,
        "eoi_token_index": 252,
    },
    # Embeddings of every layer, made beside the decoder.
    "gemma4": {
        "text_config": _text(
            "gemma4_text",
            pad_token_id=0,
            vocab_size_per_layer_input=258,
            hidden_size_per_layer_input=32,
            global_head_dim=32,
            num_kv_shared_layers=0,
            sliding_window=64,
            layer_types=None,
        ),
        "vision_config": {**TOWER, "head_dim": 16, "num_key_value_heads": 4},
        "audio_config": None,
        "image_token_id": 250,
        "boi_token_id": 251,
        "eoi_token_id": 252,
        "audio_token_id": 253,
        "video_token_id": 254,
    },
    "qwen2_vl": {
        "text_config": _text("qwen2_vl_text", tie_word_embeddings=False, **AXES),
        "vision_config": {**QWEN2, "embed_dim": 64, "hidden_size": 128},
        **SEEN,
    },
    "qwen2_5_vl": {
        "text_config": _text("qwen2_5_vl_text", **AXES),
        "vision_config": {
            **QWEN2,
            "hidden_size": 64,
            "out_hidden_size": 128,
            "intermediate_size": 128,
            "fullatt_block_indexes": [1],
        },
        **SEEN,
    },
    # What is seen is added behind blocks, too, and experts are routed.
    "qwen3_vl_moe": {
        "text_config": _text("qwen3_vl_moe_text", **AXES, **EXPERTS),
        "vision_config": {**QWEN3, "deepstack_visual_indexes": [0, 1]},
        **SEEN,
    },
    # Its text decoder has a class of its own besides.
    "qwen3_5": {
        "text_config": _text(
            "qwen3_5_text",
            num_hidden_layers=4,
            rope_parameters={**AXES["rope_parameters"], "partial_rotary_factor": 1.0},
            **LINEAR,
        ),
        "vision_config": QWEN3,
        **SEEN,
    },
    "llava": {
        "text_config": _text("llama"),
        "vision_config": {**TOWER, "model_type": "clip_vision_model"},
        "image_token_index": 250,
    },
    # A parameter that no tower holds.
    "llava_onevision": {
        "text_config": _text("qwen2"),
        "vision_config": {**TOWER, "model_type": "siglip_vision_model"},
        "image_token_index": 250,
        "video_token_index": 251,
    },
    # Positions begin with 1.
    "paligemma": {
        "text_config": _text("gemma"),
        "vision_config": {**TOWER, "model_type": "siglip_vision_model", "projection_dim": 128},
        "projection_dim": 128,
        "image_token_index": 250,
    },
    "mistral3": {
        "text_config": _text("mistral"),
        "vision_config": {**TOWER, "model_type": "pixtral", "head_dim": 16},
        "image_token_index": 250,
    },
    "smolvlm": {
        "text_config": _text("llama"),
        "vision_config": TOWER,
        "image_token_id": 250,
        "pad_token_id": 0,
        "scale_factor": 2,
    },
    # The head is inside, with the decoder.
    "llama4": {
        "text_config": _text(
            "llama4_text",
            num_hidden_layers=2,
            attention_chunk_size=64,
            intermediate_size_mlp=256,
            **EXPERTS,
        ),
        "vision_config": {
            **TOWER,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
        "image_token_index": 250,
    },
    # A tower that hears.
    "qwen2_audio": {
        "text_config": _text("qwen2"),
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "num_mel_bins": 16,
        },
        "audio_token_index": 250,
    },
}

# What runs on no text alone: a block that reads an image, a forward that asks for one.
BLIND = {
    "mllama": {
        "text_config": _text(
            "mllama_text_model",
            num_hidden_layers=4,
            cross_attention_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        "vision_config": {
            **TOWER,
            "attention_heads": 4,
            "num_global_layers": 1,
            "max_num_tiles": 2,
            "vision_output_dim": 128,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
        },
        "image_token_index": 250,
    },
    "blip-2": {
        "text_config": _text("opt", ffn_dim=256, word_embed_proj_dim=128),
        "vision_config": TOWER,
        "qformer_config": {**TOWER, "encoder_hidden_size": 64, "vocab_size": 258},
        "num_query_tokens": 4,
        "image_token_index": 250,
    },
}


def compose(name: str, seed: int = 0) -> PreTrainedModel:
    """The model in float32 on the CPU, in evaluation mode.

    The seed leaves the global random state alone.
    """
    config = AutoConfig.for_model(name, **(COMPOSITES | BLIND)[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
