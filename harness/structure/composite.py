"""Models that are more than a text decoder: towers that see or hear, projectors, and the decoder.

Such a model is loaded whole, and run on text. The decoder in it is what a structure describes;
towers are all that stands beside it, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """What a config says of the text decoder; the config itself where it says nothing else."""
    return config.get_text_config(decoder=True)


def is_composite(config: PreTrainedConfig) -> bool:
    """Whether models of this config hold towers beside their text decoder."""
    return type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and text_config(config) is not config


def model_class(config: PreTrainedConfig):
    """transformers' class that makes whole models of a config."""
    return AutoModelForMultimodalLM if is_composite(config) else AutoModelForCausalLM


def separate(config: PreTrainedConfig) -> None:
    """Have models of this config keep their head apart from their embedding."""
    for part in (config, text_config(config)):
        part.tie_word_embeddings = False


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """What runs the blocks of a composite model; any other model is its own decoder."""
    if not is_composite(model.config):
        return model
    decoder = model.get_decoder()
    # one with a head of its own holds the decoder in turn
    while (inner := decoder.get_decoder()) is not decoder:
        decoder = inner
    return decoder


def towers_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The absolute names of what stands beside decoder, embedding and head, outermost modules.

    Parameters that no such module holds are named themselves.
    """
    decoder = decoder_of(model)
    if decoder is model:
        return ()
    text = {decoder, model.get_input_embeddings(), model.get_output_embeddings()}
    return tuple(_beside(model, text, ""))


def _beside(module: nn.Module, text: set[nn.Module], prefix: str) -> Iterator[str]:
    """What of a module, which holds parts of `text`, holds none of them."""
    yield from (prefix + name for name, _ in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        if child in text:
            continue
        if text.isdisjoint(child.modules()):
            yield prefix + name
        else:
            yield from _beside(child, text, f"{prefix}{name}.")
