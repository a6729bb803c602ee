"""A model without weights, from its config alone: enough to derive its structure."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from harness.libraries.transformers import forget_functions
from harness.structure.composite import model_class, separate


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The language model of a config, in bfloat16 on the device `meta`, evaluation mode.

    Its head is its own, whatever the config says, for what is done to one may not reach the other.
    """
    config = copy.deepcopy(config)
    tied = getattr(config, "tie_word_embeddings", False)
    separate(config)
    forget_functions(config)
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=torch.bfloat16)
    model.config.tie_word_embeddings = tied  # it says of blocks, too, whether they are one
    return model.eval()
