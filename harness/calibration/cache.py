"""The ranges of keys and values that a cache with static scales is given, layer by layer.

    amax_K = max |k_t R3|,  amax_V = max |v_t|  over the calibration text,    FP8: s = amax / 448

Keys and values are floats meanwhile, of the model as it is solved: weights and activations are
quantized. Source: llm-compressor (kv_cache_scheme with dynamic=false), whose scales vLLM reads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.calibration.stream import Stream
from harness.formats import KVCache
from harness.models.adapter import Adapter
from harness.models.attention import HeadsInput, attach
from harness.parallel import ALONE, Ranks


@torch.no_grad()
def calibrate(
    adapter: Adapter,
    kv: KVCache,
    windows: Tensor,
    advance: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> None:
    """Give every attention module the scales of its keys and values.

    windows: token ids [N, L]; advance: called for each block; ranks: each sees its share.
    """
    attached = attach(adapter)
    peaks = {heads: {"key": 0.0, "value": 0.0} for heads in attached}

    def watch(heads: HeadsInput, _, read: tuple[Tensor, ...]) -> None:
        for part, x in zip(("key", "value"), read[1:]):
            peaks[heads][part] = max(peaks[heads][part], float(x.abs().max()))

    handles = []
    for heads in attached:
        heads.format = None
        handles.append(heads.register_forward_hook(watch))
    try:
        # a window is a batch of one, also to who quantizes tokens
        stream = Stream(adapter, windows, tokens_at_once=windows.shape[1], ranks=ranks)
        for index, block in enumerate(adapter.blocks):
            with adapter.open(index):
                stream.advance(block)
            advance()
    finally:
        for handle in handles:
            handle.remove()
    for heads in attached:
        for part, own in peaks[heads].items():
            peak = max(ranks.gather(own))
            high = torch.tensor(peak, device=adapter.device)
            scale = kv.part(part).calibrated(-high, high)
            assert scale is not None  # what is static is calibrated
            heads.scales[part] = scale
