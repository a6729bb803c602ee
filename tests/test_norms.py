"""A norm is known by what it does to a vector, whatever class it is of."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from unseen import Wrapped

from harness.structure.norms import NormKind, norm_kind

WIDTH = 48


class Standardized(nn.Module):
    """A LayerNorm by another formula, whose shift has a name of its own."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
        return torch.addcmul(self.shift, (x - mean) * variance.rsqrt(), self.weight)


class ByHead(nn.Module):
    """Normalizes each 16 features by themselves, so that no rotation of all of them commutes."""

    def forward(self, x):
        parts = x.unflatten(-1, (-1, 16))
        return (parts / parts.square().mean(-1, keepdim=True).sqrt()).flatten(-2)


class Doubled(nn.Module):
    """A gain that is neither w nor 1 + w, so that nobody would know where to merge it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return 2 * self.weight * F.rms_norm(x, x.shape[-1:])


NORMS = {
    "rms": (LlamaRMSNorm(WIDTH), NormKind("rms", "w", False)),
    "rms of torch": (nn.RMSNorm(WIDTH), NormKind("rms", "w", False)),
    "rms with 1 + w": (GemmaRMSNorm(WIDTH), NormKind("rms", "1+w", False)),
    "rms without gain": (nn.RMSNorm(WIDTH, elementwise_affine=False), NormKind("rms", "1", False)),
    "layer": (nn.LayerNorm(WIDTH), NormKind("layer", "w", True)),
    "layer without bias": (nn.LayerNorm(WIDTH, bias=False), NormKind("layer", "w", False)),
    "layer without gain": (OlmoLayerNorm(WIDTH), NormKind("layer", "1", False)),
    "unseen rms": (Wrapped(WIDTH), NormKind("rms", "1+w", False)),
    "unseen layer": (Standardized(WIDTH), NormKind("layer", "w", True)),
}
OTHERS = {
    "linear": nn.Linear(WIDTH, WIDTH),
    "silu": nn.SiLU(),
    "dropout": nn.Dropout(0.5),
    "dropout in evaluation": nn.Dropout(0.5).eval(),
    "softmax": nn.Softmax(dim=-1),
    "by head": ByHead(),
    "another gain": Doubled(WIDTH),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_norm_is_known_by_what_it_does(name, device):
    module, kind = NORMS[name]
    assert norm_kind(copy.deepcopy(module).to(device), WIDTH) == kind


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_norm_is_refused(name):
    assert norm_kind(OTHERS[name], WIDTH) is None
