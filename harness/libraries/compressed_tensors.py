"""compressed-tensors, its insides: the cache it finds, what scales an activation, what runs its
transforms, how transformers makes experts of its files.

is_cached_attention_module
    which modules get a quantized cache
TransformFactory, TransformBase, random_hadamard_matrix
    what runs a `transform_config`
CompressedTensorsHfQuantizer, update_weight_conversions, MergeModulelist
    what transformers does with a file's tensors before it stacks them
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # a planning process asks for `cache_refusal` alone, and may never need torch
    from torch import Tensor, nn


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


def has_hadamard(order: int) -> bool:
    """Whether it can make a Hadamard matrix of that order, to be filled with a file's."""
    import torch
    from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix

    try:
        random_hadamard_matrix(order, torch.float32, torch.device("meta"))
    except ValueError:
        return False
    return True


def attach_transforms(model: nn.Module, config: Mapping) -> dict[str, nn.Parameter]:
    """Put what of a `transform_config` runs online into a model with merged weights.

    Returns {absolute name: matrix} of all of them, drawn anew where they are random; those that
    are shared are one parameter under several names.
    """
    from compressed_tensors.transform import TransformBase, TransformConfig, TransformFactory

    for name, scheme in TransformConfig.model_validate(config).config_groups.items():
        scheme.apply = [args for args in scheme.apply if args.is_online()]
        # not apply_transform_config, which draws a progress bar
        TransformFactory.from_scheme(scheme, name=name).apply_to_model(model, use_tqdm=False)
    return {
        f"{name}.{entry}": parameter
        for name, module in model.named_modules()
        if isinstance(module, TransformBase)
        for entry, parameter in module.named_parameters(recurse=False)
    }


def expert_loaded(entries: Mapping[str, Tensor], group: Mapping, like: Tensor) -> Tensor | None:
    """The weight that transformers makes of a routed expert's entries in a file, None where it
    makes none.

    It decodes experts while it loads them, by code of its own that knows fewer entries than that of
    linears. group: a group of config.json, of this layout alone; like: of the weight's shape and of
    the model's dtype.
    """
    import torch
    from torch import nn
    from transformers.core_model_loading import (
        MergeModulelist,
        WeightConverter,
        rename_source_key,
    )
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
    from transformers.utils.quantization_config import CompressedTensorsConfig

    config = CompressedTensorsConfig(
        config_groups=cast(Any, {"group_0": group}),
        format=group["format"],
        quantization_status=cast(Any, "compressed"),
    )
    quantizer = CompressedTensorsHfQuantizer(config)
    quantizer.validate_environment()
    model = nn.Module()  # with the experts of one layer: a single one
    model.experts = nn.Module()
    model.experts.weights = nn.Parameter(torch.empty_like(like[None]), requires_grad=False)
    stacked = WeightConverter("experts.*.one.weight", "experts.weights", [MergeModulelist()])
    converter, *_ = quantizer.update_weight_conversions([stacked], model)
    for name, tensor in entries.items():
        target, pattern = rename_source_key(f"experts.0.one.{name}", [], [converter])
        if pattern is not None:
            converter.add_tensor(target, name, pattern, tensor)
    try:
        made = converter.convert("experts.weights", model=model)["experts.weights"]
    except Exception:  # whatever it lacks, or takes for something else, it ends somewhere inside
        return None
    return made[0]
