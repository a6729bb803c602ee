"""What a transform costs at run time, beside the linears it serves.

    online = operations of all codecs that run on activations / operations of the linears' products

for one token, a multiplication and an addition as one operation, Hadamard matrices as their fast
transform. The second products of residual channels count as codecs do, routed experts all, on both
sides. Kernels differ in what an operation takes; this is what they have to do.
"""

from __future__ import annotations

from harness.codecs.codec import Codec
from harness.models.adapter import Adapter
from harness.models.attention import HeadsInput
from harness.models.quant_linear import QuantLinear, SiteInput


def online(adapter: Adapter) -> float:
    """The share; 0 where every codec is merged into weights."""
    widths: dict[SiteInput, int] = {}
    linears = 0
    added = _attention(adapter)
    for module in adapter.model.modules():
        if isinstance(module, QuantLinear):
            widths[module.site] = module.in_features
            linears += module.in_features * module.out_features
            added += module.site.twice * module.out_features
            added += _operations(module.decoder, module.in_features)
            added += _operations(module.encoder, module.out_features)
    for site, width in widths.items():
        added += _operations(site.codec, width) + _operations(site.decoder, width)
    return added / linears if linears else 0.0


def _attention(adapter: Adapter) -> int:
    """Of what turns queries and keys."""
    added = 0
    for layer, attention in adapter.structure.attention.items():
        if attention.module is None:
            continue
        inputs = getattr(adapter.blocks[layer].get_submodule(attention.module), "heads_input", None)
        if isinstance(inputs, HeadsInput):
            each = _operations(inputs.codec, attention.features[0])
            added += (attention.heads + attention.kv_heads) * each
    return added


def _operations(codec: Codec | None, width: int) -> int:
    return 0 if codec is None else codec.operations(width)
