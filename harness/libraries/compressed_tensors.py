"""compressed-tensors, its insides: the cache it finds, and what scales an activation."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a planning process asks for `cache_refusal` alone, and may never need torch
    from torch import nn


def cache_refusal() -> str | None:
    """Why a `kv_cache_scheme` would do nothing here, or None where it works.

    compressed-tensors 0.20 wraps the argument that carries an attention module's cache, and knows
    its names up to transformers 5.23. The one of 5.24 it passes by: keys and values stay as they
    are, without a word.
    """
    import torch
    from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    with torch.device("meta"):
        attention = LlamaAttention(LlamaConfig(hidden_size=8, num_attention_heads=1), layer_idx=0)
    if is_cached_attention_module(attention):
        return None
    return (
        f"compressed-tensors {version('compressed-tensors')} does not find the cache of "
        f"transformers {version('transformers')} and would leave keys and values as they are"
    )


def spans_tokens(module: nn.Module) -> bool:
    """Whether a module of a model that it runs scales its activation by the whole tensor."""
    act = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
    return act is not None and act.dynamic is True and act.strategy == "tensor"
