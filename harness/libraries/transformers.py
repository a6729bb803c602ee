"""transformers, its insides: attention and experts by name, a generation's cache, tied weights.

AttentionInterface, AttentionMaskInterface, _attn_implementation, eager_attention_forward
    the function an attention module calls is found by a name; the plain one is of its own file
ExpertsInterface, _experts_implementation_internal, is_transposed, has_gate, _apply_gate
    the function that runs a layer's experts is found by a name too
DynamicCache, DynamicLayer, Cache
    past keys and values; the argument is `cache` from 5.24 on and `past_key_values` before
_encode_special_floats
    how a config.json holds an infinity, which is no JSON
all_tied_weights_keys, get_expanded_tied_weights_keys
    which parameters are saved once
_init_weights, _non_persistent_buffers_set
    what a model computes from its config, and no file holds
cached_file
    where a file of a model lies, by the folder or hub id and the options of from_pretrained
_keys_to_ignore_on_load_unexpected, _keys_to_ignore_on_load_missing, _is_hf_initialized
    what a file may hold and a model has no use for; what else from_pretrained begins and reports

conversion.py has files' tensors on their way to parameters, saved.py on their way back.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.hub import cached_file

from harness.config.errors import DataError

__all__ = ["Cache", "DynamicCache", "DynamicLayer"]
WATCHED = "harness_watched_"  # and the name of what it hands over to
UNSET = 12345.678  # of a buffer that nobody has computed
CACHE_ARGUMENTS = ("cache", "past_key_values")


def folder_of(model: str, **options) -> Path | None:
    """The folder with a model's config.json: its own, or that of its revision in the hub's cache,
    which is fetched where it is not there. None where a repository has none.

    options: of from_pretrained. Raises OSError where the hub is needed and cannot be reached.
    """
    file = cached_file(model, "config.json", **options)
    return None if file is None else Path(file).parent


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


def forget_functions(config: PreTrainedConfig) -> None:
    """Have models of this config find their own attention and experts again."""
    config._attn_implementation_internal = None
    config._experts_implementation_internal = None
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            forget_functions(part)


class Given(nn.Module):
    """Stands where a model's backbone does, and gives hidden states [B, T, n] that are there.

    What else is asked of it, the backbone answers.
    """

    def __init__(self, hidden: Tensor, backbone: nn.Module):
        super().__init__()
        self.__dict__ |= {"hidden": hidden, "backbone": backbone}  # no parts of the module

    def __getattr__(self, name: str):
        return getattr(self.__dict__["backbone"], name)

    def forward(self, *args, **kwargs) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.__dict__["hidden"])


def name_experts(name: str, function: Callable) -> None:
    """Make `function` what runs the experts of models whose config asks for `name`."""
    ALL_EXPERTS_FUNCTIONS.register(name, function)


def use_experts(model: nn.Module, name: str) -> None:
    """Have a model run its experts by the function of that name."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._experts_implementation_internal = name


def runs_experts(module: nn.Module) -> bool:
    """Whether a module of experts finds what runs them by its name."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "_apply_gate"))


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


def config_json(fields: Mapping) -> dict:
    """The fields of a config as its file holds them: infinities by name, which JSON has none of."""
    return PreTrainedConfig._encode_special_floats(dict(fields))


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """{parameter: the parameter it is one with}; none where the config ties none.

    Not every config says whether it ties.
    """
    return model.all_tied_weights_keys or {}


def shared_names(model: PreTrainedModel) -> dict[str, str]:
    """The same by what the config says by now, whether the model's parameters are one or not."""
    return model.get_expanded_tied_weights_keys(all_submodels=True)


def untie_names(model: PreTrainedModel) -> None:
    """Have every parameter saved by its own name."""
    model.all_tied_weights_keys.clear()


def unused(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those names of a file's tensors that a model of this class knows it has no use for."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def leave_unfilled(model: PreTrainedModel) -> Callable[[], None]:
    """Have from_pretrained neither draw nor report what it does not find in the files of a model
    that somebody else fills; what is returned undoes it.
    """
    names = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")
    before = [getattr(model, name) for name in names]
    for name in names:
        setattr(model, name, {r"."})
    for module in model.modules():
        module.__dict__["_is_hf_initialized"] = True

    def undo() -> None:
        for name, patterns in zip(names, before):
            setattr(model, name, patterns)

    return undo


def compute_buffers(model: PreTrainedModel, device) -> None:
    """Give a model without storage what it computes from its config: rotary tables and scales."""
    for module, owner in _owned(model):
        computed = [
            name
            for name in module._non_persistent_buffers_set
            if module._buffers[name] is not None and module.get_buffer(name).is_meta
        ]
        for name in computed:
            empty = torch.empty_like(module.get_buffer(name), device=device)
            module._buffers[name] = empty.fill_(_unset(empty.dtype))
        if computed:  # its parameters are still without storage, and take nothing
            owner._init_weights(module)
        for name in computed:
            values = module.get_buffer(name)
            if bool((values == _unset(values.dtype)).any()):
                raise DataError(
                    f"a {type(model).__name__} computes {name} when it is built, and no weights "
                    "can be left on disk; set model.weights=memory."
                )


def _owned(model: PreTrainedModel) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
    """(module, the innermost model it is of), which knows how to begin with it."""
    owners: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        around = owners.get(name.rpartition(".")[0], model)
        owners[name] = module if isinstance(module, PreTrainedModel) else around
        yield module, owners[name]


def _unset(dtype: torch.dtype) -> float:
    """What no buffer is computed as; of truth values, which have no other, one of the two."""
    if dtype.is_floating_point or dtype.is_complex:
        return UNSET
    return 0 if dtype == torch.bool else torch.iinfo(dtype).min
