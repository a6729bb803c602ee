"""Attention to a cache whose newest tokens are floats, for all queries of a forward at once.

    out_t = softmax(q_t [Q(K)_{s < a_t}, K_{s >= a_t}]^T) [Q(V)_{s < b_t}, V_{s >= b_t}]

with a_t >= b_t the tokens that query t reads quantized (KVCache.old). As t differs, a token stands
up to three times among what is attended to, as (Q(k), Q(v)), (Q(k), v) and (k, v), and the mask
shows every query one of them: so the attention that is there, with its sinks, caps and sliding
windows, computes it. One query alone finds every token once.

Source: KIVI (arXiv 2402.02750) and its code. Difference: its prefill reads floats throughout and
quantizes then; here every token reads what it would if it had been decoded, so that perplexity
sees the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.formats import KVCache


def spread(
    kv: KVCache,
    quantize: Callable[[Tensor, str], Tensor],
    states: tuple[Tensor, Tensor],
    settled: tuple[int, int],
    mask: Tensor | None,
    queries: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values [B, kv_heads, S, head_dim] and mask [.., queries, S] to be attended to.

    quantize(x, part) is the cache's. states: keys and values of all T tokens, of which the newest
    `queries` ask; the first `settled` of each are quantized already. mask: of the model, [.., T]
    bool (True: seen) or added to scores; None: causal.
    """
    key, value = states
    tokens = key.shape[-2]
    asking = range(tokens - queries, tokens)
    old_keys = [kv.old(t, "key") for t in asking]
    old_values = [kv.old(t, "value") for t in asking]
    cached_key = _quantized(quantize, key, "key", settled[0], old_keys[-1])
    cached_value = _quantized(quantize, value, "value", settled[1], old_values[-1])

    s = torch.arange(tokens, device=key.device)
    t, a, b = (s.new_tensor(each).unsqueeze(-1) for each in (asking, old_keys, old_values))
    seen = (s <= t)[None, None] if mask is None else mask
    pieces = [  # keys, values, where any query reads them together, which does
        (cached_key, cached_value, slice(0, old_values[-1]), s < b),
        (cached_key, value, slice(old_values[0], old_keys[-1]), (s >= b) & (s < a)),
        (key, value, slice(old_keys[0], tokens), s >= a),
    ]
    return (
        torch.cat([k[..., where, :] for k, _, where, _ in pieces], -2),
        torch.cat([v[..., where, :] for _, v, where, _ in pieces], -2),
        torch.cat([_only(seen[..., where], reads[:, where]) for *_, where, reads in pieces], -1),
    )


def _quantized(
    quantize: Callable[[Tensor, str], Tensor], x: Tensor, part: str, settled: int, due: int
) -> Tensor:
    """x [.., T, head_dim] up to token `due`, quantized from `settled` on."""
    if due <= settled:
        return x[..., :due, :]
    return torch.cat([x[..., :settled, :], quantize(x[..., settled:due, :], part)], -2)


def _only(mask: Tensor, shown: Tensor) -> Tensor:
    """The mask where `shown`, nothing seen elsewhere."""
    if mask.dtype == torch.bool:
        return mask & shown
    return mask.masked_fill(~shown, torch.finfo(mask.dtype).min)
