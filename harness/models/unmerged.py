"""The forward of a model with a placement *not* merged: codecs act on activations.

    reader     y = Q(h E) D W^T + b
    writer     h <- h + (y W^T + b) E
    embedding  h = T[ids] E
    stored     y = Q(h E) Q_w(W D^T)^T + b

This is how transforms learn end to end. It computes what the folded model computes, but needs no
gradient of any weight and no fold a step: T n g multiplications a codec instead of out n g a weight
and T out n for its gradient. Rejected: the fold inside `torch.func.functional_call`, which
codecs/fold.py allows and whose gradient is the same (a test), for that work. `stored` has to do it
all the same: what is learned then is how weights are rounded, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from harness.formats import Scheme
from harness.libraries.transformers import attention_name
from harness.models.adapter import Adapter
from harness.models.attention import NAME, attach, detach
from harness.models.quant_linear import QuantLinear
from harness.models.ranged import Ranged
from harness.transforms import Codec, Placement, Role


@contextmanager
def unmerged(
    adapter: Adapter,
    placement: Placement,
    scheme: Scheme | None = None,
    stored: bool = False,
    layer: int | None = None,
) -> Iterator[None]:
    """Within it the swapped model runs with `placement` applied to activations.

    With a scheme, activations and the KV cache are quantized too (straight-through; scales that
    would be calibrated follow each tensor). stored: weights are too, rounded to nearest as they
    would be merged, and scales pass gradients (ranged.py). layer: of that block alone. Undone on
    leaving.

    The model must carry no codec or quantizer of its own at the places used.
    """
    handles = []
    touched = []
    for name, role in adapter.roles.items():
        if layer not in (None, role.layer):
            continue
        module = adapter.model.get_submodule(name)
        if role.kind in ("embedding", "norm") and (encoder := placement.writing(role)) is not None:
            handles.append(module.register_forward_hook(_encoding(encoder)))
        elif role.kind == "linear" and isinstance(module, QuantLinear):
            _attach_codecs(module, role, placement, scheme, stored)
            touched.append(module)
        elif role.kind == "linear" and placement.residual is not None:
            handles.append(module.register_forward_pre_hook(_decoding(placement.residual)))
    kv = None if scheme is None else scheme.kv
    before = attention_name(adapter.decoder.config)
    attached = []
    if placement.query_key is not None or kv is not None:
        attached = attach(adapter)
    for heads in attached:
        heads.codec = placement.query_key
        heads.format = None if kv is None else kv.dynamic()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in touched:
            module.encoder = module.decoder = module.rounding = None
            module.site.codec = module.site.decoder = None
            module.site.format = module.site.ranged = None
        for heads in attached:
            heads.codec = heads.format = None
        # heads that were there before stay for whoever attached them
        if attached and not before.startswith(NAME):
            detach(adapter)


def _attach_codecs(
    module: QuantLinear, role: Role, placement: Placement, scheme: Scheme | None, stored: bool
) -> None:
    """What one linear reads and writes; a decoder that all readers of its site share goes there."""
    module.encoder = placement.writing(role)
    module.site.codec = placement.encoder(role.layer, role.reads)
    act = None if scheme is None else scheme.part("act", role.layer, role.name)
    if act is not None:
        act = act.dynamic()  # nothing is calibrated yet: scales follow each tensor
    module.site.format = act
    clips = placement.clips.get((role.layer, role.name), {})
    if stored and act is not None:
        module.site.ranged = Ranged(act, clips.get("act"))
    weight = None if scheme is None else scheme.part("weight", role.layer, role.name)
    if stored and weight is not None:
        quantizer = Ranged(replace(weight, observer="minmax"), clips.get("weight"))
        module.rounding = partial(_merged, placement.reading(role), quantizer)
    elif stored or (role.layer, role.name) in placement.decoders:
        module.decoder = placement.reading(role)
    else:
        module.site.decoder = placement.reading(role)


def _merged(codec: Codec | None, quantizer: Ranged, weight: Tensor) -> Tensor:
    """A weight [out, in] as it would be stored."""
    merged = weight if codec is None else codec.absorb(weight)
    return quantizer.fake(merged, ste=torch.is_grad_enabled())


def _encoding(codec: Codec) -> Callable:
    """A forward hook: what the module writes, encoded."""
    return lambda _, args, y: codec.encode(y)


def _decoding(codec: Codec) -> Callable:
    """A forward pre-hook: what the module reads, decoded."""
    return lambda _, args: (codec.decode(args[0]), *args[1:])
