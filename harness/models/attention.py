"""Queries, keys and values between RoPE and scores: rotation R3, quantized KV cache.

    scores = (q R3) Q(k R3)^T,     output = softmax(scores) Q(v)

transformers calls an attention function by the name in the model's config; ours does the above and
hands over to the one that was there before, whatever that does with sinks, caps and windows. The
name is set on one model's config, what it does hangs on that model's own modules, and `detach`
removes both. Every token is quantized by itself, so a forward over a
whole text sees the same keys and values as decoding with a cache; `cache` gives one that stores
them quantized, each token once. Source: QuaRot (arXiv 2404.00456) section 4; keys are taken after
RoPE.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.formats import KVCache
from harness.formats.base import straight_through
from harness.libraries.transformers import (
    Cache,
    DynamicLayer,
    attention_function,
    attention_name,
    name_attention,
    use_attention,
)
from harness.models.adapter import Adapter
from harness.transforms import Codec

NAME = "harness_kv_"  # and the name of what it hands over to


class HeadsInput(nn.Module):
    """R3 and the KV formats of one attention module.

    Queries, keys and values are [B, heads, T, head_dim].
    """

    def __init__(self):
        super().__init__()
        self.codec: Codec | None = None
        self.format: KVCache | None = None
        self.before: str = "eager"  # the attention that is handed over to, and comes back
        self._cached: Tensor | None = None

    def rotate(self, x: Tensor) -> Tensor:
        """x R3, for queries and keys."""
        return x if self.codec is None else self.codec.encode(x)

    def quantize(self, x: Tensor, part: str) -> Tensor:
        """Keys (rotated) or values as the cache returns them; part: key | value."""
        if self.format is None:
            return x
        dq = self.format.fake(x.detach(), part)
        return straight_through(x, dq) if torch.is_grad_enabled() else dq

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values as they are kept: rotated, quantized."""
        return self.quantize(self.rotate(key), "key"), self.quantize(value, "value")

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # rotations and rounding have a precision of their own
        with torch.autocast(query.device.type, enabled=False):
            # keys out of a QuantizedLayer were rotated and quantized on their way in
            if key is not self._cached:
                key, value = self.store(key, value)
            self._cached = None
            return self.rotate(query), key, value


class QuantizedLayer(DynamicLayer):
    """One layer's part of the cache: a token is rotated and quantized once, when it enters."""

    def __init__(self, heads: HeadsInput):
        super().__init__()
        self._heads = heads

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*self._heads.store(key_states, value_states), *args, **kwargs)
        # transformers hands these very keys to the attention function next
        self._heads._cached = keys
        return keys, values


def attach(adapter: Adapter) -> list[HeadsInput]:
    """Put a HeadsInput into every attention module (found again when it is there already).

    Returns them in block order.
    """
    attached = []
    for module in _modules(adapter):
        heads = getattr(module, "heads_input", None)
        if not isinstance(heads, HeadsInput):
            heads = HeadsInput()
            module.heads_input = heads
        attached.append(heads)
    before = attention_name(adapter.decoder.config)
    # attached twice, what there was before is remembered from the first time
    if not before.startswith(NAME):
        for heads in attached:
            heads.before = before
        name_attention(NAME + before, _attention, before)
        use_attention(adapter.decoder, NAME + before)
    return attached


def detach(adapter: Adapter) -> None:
    """Leave the model as `attach` found it."""
    for module in _modules(adapter):
        heads = getattr(module, "heads_input", None)
        if isinstance(heads, HeadsInput):
            use_attention(adapter.decoder, heads.before)
            del module.heads_input


def cache(adapter: Adapter) -> Cache:
    """An empty cache for this model's attached heads, to be handed to `model.generate`."""
    return Cache(layers=[QuantizedLayer(heads) for heads in attach(adapter)])


def _modules(adapter: Adapter) -> list[nn.Module]:
    """The attention modules that a function can be put in place of, in block order."""
    return [
        adapter.blocks[layer].get_submodule(attention.module)
        for layer, attention in adapter.structure.attention.items()
        if attention.module is not None
    ]


def _attention(module, query, key, value, attention_mask, **kwargs):
    heads = module.heads_input
    query, key, value = heads(query, key, value)
    inner = attention_function(module, heads.before)
    return inner(module, query, key, value, attention_mask, **kwargs)
