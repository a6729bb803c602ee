"""transformers, its insides: attention by name, a generation's cache, tied weights, GGUF files.

AttentionInterface, sdpa_attention_forward, sdpa_mask
    the function an attention module calls is found by a name
DynamicCache, DynamicLayer, Cache
    past keys and values; the argument is `cache` from 5.24 on and `past_key_values` before
all_tied_weights_keys
    which parameters are saved once
_keys_to_ignore_on_load_unexpected
    what a file may hold and a model has no use for
load_gguf_checkpoint
    tensors and config of a GGUF file
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["Cache", "DynamicCache", "DynamicLayer", "sdpa_attention_forward"]
CACHE_ARGUMENTS = ("cache", "past_key_values")


def name_attention(name: str, function: Callable) -> None:
    """Make `function` the attention of models whose config asks for `name`.

    Its masks are those of scaled dot products.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_name(config: PreTrainedConfig) -> str | None:
    """The name by which a model of this config finds its attention function."""
    return config._attn_implementation


def use_attention(config: PreTrainedConfig, name: str | None) -> None:
    """Have a model of this config call the attention function of that name."""
    config._attn_implementation = name


def empty_plain_cache(arguments: Mapping) -> DynamicCache | None:
    """The plain cache, nothing in it yet, among the keyword arguments of a backbone's forward."""
    for name in CACHE_ARGUMENTS:
        past = arguments.get(name)
        # not of a subclass, whose layers store in ways of their own
        if type(past) is DynamicCache and past.get_seq_length() == 0 and not past.offloading:
            return past
    return None


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """{parameter: the parameter it is one with} of a model whose config ties them."""
    return model.all_tied_weights_keys or {}


def untie_names(model: PreTrainedModel) -> None:
    """Have every parameter saved by its own name."""
    model.all_tied_weights_keys.clear()


def unused(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those names of a file's tensors that a model of this class knows it has no use for."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def read_gguf(
    path: Path, config: PreTrainedConfig, skeleton: nn.Module
) -> tuple[dict, dict[str, Tensor]]:
    """(config fields, {parameter name: float32 tensor}) of a GGUF file, for a model of that config.

    The skeleton is shown without its submodules, for the loader works out the whole table of names
    again for each of them.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    names = SimpleNamespace(config=config, state_dict=skeleton.state_dict, named_children=dict)
    content = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=names)
    return content["config"], content["tensors"]
