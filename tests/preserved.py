"""A tiny float64 model whose norms keep their dtype, so that what should be exact can be held to
1e-10."""

import inspect

import torch
from torch import nn
from transformers import AutoConfig, LlamaForCausalLM

from harness.formats import Scheme
from harness.models import adapter as architecture
from harness.models.adapter import Adapter
from harness.models.tiny import Tiny
from harness.transforms import ModelShape

# what transformers calls a forward's past keys and values: from 5.24 on, and before
CACHE = next(
    x
    for x in ("cache", "past_key_values")
    if x in inspect.signature(LlamaForCausalLM.forward).parameters
)


class Norm(nn.Module):
    """RMSNorm in the dtype of its input; transformers' own computes in float32 whatever the model
    is."""

    def __init__(self, weight: torch.Tensor, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def exact_model(family: str, tie: bool = True, seed: int = 0) -> Adapter:
    """A tiny model in float64; biases and norms of every kind are random."""
    model, _ = Tiny(family=family, tie=tie, seed=seed).load()
    model = model.double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, Norm(module.weight.data, module.variance_epsilon))
    return Adapter(model)


def token_ids(count: int = 2, length: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(256, (count, length), generator=torch.Generator().manual_seed(seed))


def shape_of(
    adapter: Adapter, scheme: Scheme | None = None, seed: int = 0, solver: str | None = "rtn"
) -> ModelShape:
    return architecture.shape_of(adapter.structure, scheme or Scheme(), seed, solver)


def tiny_shape(scheme: Scheme) -> ModelShape:
    """What is known of the tiny Llama before it is loaded."""
    config = AutoConfig.for_model(**Tiny().facts())
    return architecture.shape_of(architecture.structure_of(config), scheme)


@torch.no_grad()
def logits(adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    return adapter.model(input_ids=ids, use_cache=False).logits
