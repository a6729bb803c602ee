"""Tiny decoders of many architectures with random weights: what each architecture's modules look
like and how they are called, at around a million parameters. Nothing is downloaded.

Each module holds the architectures of one kind: model_type and the fields of a config, by name.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from zoo.deepseek import DEEPSEEK_LIKE
from zoo.dense import LLAMA_LIKE, OTHER_DENSE
from zoo.families import GEMMA, QWEN
from zoo.mixtures import MIXTURES
from zoo.older import OLDER
from zoo.recurrent import RECURRENT

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


def token_ids(count: int = 1, length: int = 24, seed: int = 0) -> torch.Tensor:
    """int64 [count, length]: bytes drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, length), generator=generator)


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
