"""transformers, its insides: attention by name, a generation's cache, tied weights, GGUF files.

AttentionInterface, AttentionMaskInterface, _attn_implementation, eager_attention_forward
    the function an attention module calls is found by a name; the plain one is of its own file
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
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["Cache", "DynamicCache", "DynamicLayer"]
WATCHED = "harness_watched_"  # and the name of what it hands over to
CACHE_ARGUMENTS = ("cache", "past_key_values")


def name_attention(name: str, function: Callable, before: str) -> None:
    """Make `function` the attention of models whose config asks for `name`.

    Its masks are those of the implementation called `before`.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])


def attention_name(config: PreTrainedConfig) -> str:
    """The name by which a model of this config finds its attention function."""
    return config._attn_implementation or "eager"


def use_attention(model: nn.Module, name: str) -> None:
    """Have a model call the attention function of that name."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = name


def attention_function(module: nn.Module, name: str) -> Callable:
    """The attention of that name as this module would call it; the plain one is its file's own."""
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].__dict__["eager_attention_forward"]


@contextmanager
def watched_attention(model: PreTrainedModel) -> Iterator[list[nn.Module]]:
    """Within it, the modules of a model that find their attention by its name, as they call it."""
    called: list[nn.Module] = []
    before = attention_name(model.config)
    name = f"{WATCHED}{before}"
    name_attention(name, _watched, before)
    for module in model.modules():
        module.__dict__[WATCHED] = (called, before)
    use_attention(model, name)
    try:
        yield called
    finally:
        use_attention(model, before)
        for module in model.modules():
            del module.__dict__[WATCHED]


def _watched(module: nn.Module, *args, **kwargs):
    called, before = module.__dict__[WATCHED]
    called.append(module)
    return attention_function(module, before)(module, *args, **kwargs)


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
