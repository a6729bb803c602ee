"""Queries, keys and values between RoPE and scores: rotation R3, quantized KV cache.

    scores = (q R3) Q(k R3)^T,     output = softmax(scores) Q(v)

transformers calls an attention function by the name in the model's config; ours does the above and
hands over to the one that was there before, whatever that does with sinks, caps and windows. The
name is set on one model's config, what it does hangs on that model's own modules, and `detach`
removes both. Every token is quantized by itself, so a forward over a whole text sees the same keys
and values as decoding with a cache; `cache` gives one that stores them quantized, each token once.
Where a window of tokens stays float, window.py sees to the same. Source: QuaRot (arXiv 2404.00456)
section 4; keys are taken after RoPE.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.config.errors import ConfigError
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
from harness.models.window import spread
from harness.transforms import Codec

NAME = "harness_kv_"  # and the name of what it hands over to
MASKED = ("eager", "sdpa")  # that take a mask of any form


class HeadsInput(nn.Module):
    """R3 and the KV formats of one attention module.

    Queries, keys and values are [B, heads, T, head_dim]. scales: what is calibrated of key | value.
    """

    _settled: tuple[int, int]

    def __init__(self):
        super().__init__()
        self.codec: Codec | None = None
        self.format: KVCache | None = None
        self.scales: dict[str, Tensor] = {}
        self.before: str = "eager"  # the attention that is handed over to, and comes back
        # keys as a cache gave them out, and how many of its keys and values were quantized by then
        self._cached: Tensor | None = None
        self._settled = (0, 0)

    def rotate(self, x: Tensor) -> Tensor:
        """x R3, for queries and keys."""
        return x if self.codec is None else self.codec.encode(x)

    def quantize(self, x: Tensor, part: str) -> Tensor:
        """Keys (rotated) or values as the cache returns them; part: key | value."""
        if self.format is None:
            return x
        dq = self.format.fake(x.detach(), part, self.scales.get(part))
        return straight_through(x, dq) if torch.is_grad_enabled() else dq

    @property
    def window(self) -> int:
        """How many of the newest tokens stay floats."""
        return 0 if self.format is None else self.format.window

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values as they are kept: rotated, and quantized where no window is."""
        if self.window:
            return self.rotate(key), value
        return self.quantize(self.rotate(key), "key"), self.quantize(value, "value")

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What attention gets, and its mask [B, 1, T, S] or None."""
        # rotations and rounding have a precision of their own
        with torch.autocast(query.device.type, enabled=False):
            settled = self._settled
            # keys out of a QuantizedLayer were rotated and quantized on their way in
            if key is not self._cached:
                key, value = self.store(key, value)
                settled = (0, 0)
            self._cached = None
            query = self.rotate(query)
            if self.format is not None and self.window:
                key, value, mask = spread(
                    self.format, self.quantize, (key, value), settled, mask, query.shape[-2]
                )
            return query, key, value, mask


class QuantizedLayer(DynamicLayer):
    """One layer's part of the cache: a token is rotated when it enters, and quantized once, then or
    when the window has gone past it."""

    def __init__(self, heads: HeadsInput):
        super().__init__()
        self._heads = heads
        self._settled = (0, 0)  # how many keys and values are quantized, of those behind a window

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        tokens = self.get_seq_length()
        if tokens and self._heads.window:
            self._settle(tokens)
        keys, values = super().update(*self._heads.store(key_states, value_states), *args, **kwargs)
        # transformers hands these very keys to the attention function next
        self._heads._cached = keys
        self._heads._settled = self._settled if tokens else (0, 0)
        return keys, values

    def _settle(self, tokens: int) -> None:
        """Quantize what token number `tokens` is the first to read quantized."""
        assert self.keys is not None and self.values is not None  # there are tokens
        keys, values = (min(count, tokens) for count in self._settled)  # some may have been cropped
        self.keys, keys = self._past(self.keys, "key", keys, tokens)
        self.values, values = self._past(self.values, "value", values, tokens)
        self._settled = (keys, values)

    def _past(self, x: Tensor, part: str, settled: int, tokens: int) -> tuple[Tensor, int]:
        """x with its tokens from `settled` to the window quantized, and how many now are."""
        format = self._heads.format
        assert format is not None  # or there is no window
        due = format.old(tokens, part)
        if due <= settled:
            return x, settled
        new = self._heads.quantize(x[..., settled:due, :], part)
        return torch.cat([x[..., :settled, :], new, x[..., due:, :]], dim=-2), due


def named(adapter: Adapter) -> dict[str, HeadsInput]:
    """{absolute name of the attention module: its HeadsInput}, attached where there was none."""
    names = [
        adapter.name(layer, attention.module)
        for layer, attention in adapter.structure.attention.items()
        if attention.module is not None
    ]
    return dict(zip(names, attach(adapter)))


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
    if heads.window and heads.before not in MASKED:
        raise ConfigError(
            f"format.kv.window={heads.window} with attn_implementation={heads.before}: it takes no "
            "mask that differs by query; load the model with attn_implementation=sdpa."
        )
    query, key, value, attention_mask = heads(query, key, value, attention_mask)
    inner = attention_function(module, heads.before)
    return inner(module, query, key, value, attention_mask, **kwargs)
