"""What FP-Quant's checkpoint can hold, of the settings of a run.

Refused, with the setting to change: a format alone, mixed ones, global scales that bfloat16 rounds
(transformers loads them so), inputs scaled by other rules than those of the kernels, and what would
run online without being one block matrix in front of every linear. fp_quant.py has the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NoReturn

import torch

from harness.checkpoints.layouts import refuse_linears
from harness.config.errors import ConfigError
from harness.formats import MX, NVFP4, Format, Scheme
from harness.transforms import ModelShape, Transform
from harness.transforms.block_diagonal import common_blocks
from harness.transforms.gsr import SequencyBlocks
from harness.transforms.hadamard import HadamardBlocks
from harness.transforms.wush import Wush

KINDS = {NVFP4: "nvfp4", MX: "mxfp4"}  # as the file calls them
ORDERS = {NVFP4: (16, 32, 64, 128), MX: (32, 64, 128)}  # hadamard_group_size


def check(
    scheme: Scheme, transforms: Sequence[Transform], context: ModelShape, pseudo: bool
) -> list[str]:
    """Refuse (ConfigError) what the layout cannot hold, as Exporter.check; returns warnings.

    pseudo: export.pseudo.
    """
    refuse_linears("fp_quant", context)
    if pseudo:
        _refuse_biases(context)
    if context.structure is not None and context.structure.towers:
        raise ConfigError(
            f"export=fp_quant with a {context.structure.architecture}: the layout is read back "
            "of text decoders alone; use export=harness or compressed_tensors."
        )
    if scheme.kv is not None:
        refuse(
            "format.kv.bits",
            scheme.kv.bits,
            "the layout has no KV cache",
            "set format.kv.bits=16",
        )
    for part, format in (("weight", scheme.weight), ("act", scheme.act)):
        both = "weights and activations are both NVFP4 or both MXFP4"
        way_out = "use format=nvfp4, format=mxfp4"
        if format is None:
            refuse(f"format.{part}.bits", 16, both, way_out)
        held = type(format) in KINDS and format.bits == 4
        if not held or type(format) is not type(scheme.weight):
            refuse(f"format.{part}", type(format).__name__, both, way_out)
        for key, legal, why in _knobs(format, pseudo):
            if getattr(format, key) not in legal:
                refuse(
                    f"format.{part}.{key}",
                    getattr(format, key),
                    why,
                    f"set format.{part}.{key}={legal[0]}",
                )
    online = [transform for transform in transforms if transform.leaves(context)]
    _check_overrides(scheme, bool(online))
    assert scheme.weight is not None  # refused above
    order = _order(online, context, type(scheme.weight))
    warnings = [
        "export=fp_quant: loaded back by its documented layout; the kernels themselves need a GPU"
    ]
    rounded = not any(isinstance(transform, Wush) for transform in online)
    if order in (32, 128) and rounded:
        warnings.append(
            f"transform.block_size={order} with export=fp_quant: 1/sqrt({order}) is rounded to "
            "bfloat16, so inputs come out 1e-4 smaller; blocks of 16 and 64 are exact"
        )
    if pseudo:
        warnings.append(
            "export.pseudo=true: transformers loads it only with ignore_mismatched_sizes=True"
        )
    return warnings


def _refuse_biases(context: ModelShape) -> None:
    """Refuse export.pseudo=true for quantized linears with biases."""
    sites = [] if context.structure is None else chain.from_iterable(context.structure.sites)
    for matrix in chain.from_iterable(site.matrices for site in sites):
        if matrix.quantize and matrix.bias is not None:
            refuse(
                "export.pseudo",
                "true",
                f"{matrix.name} has a bias, which fp_quant 0.3.2 adds twice",
                "set export.pseudo=false",
            )


def _knobs(format: Format, pseudo: bool) -> Iterable[tuple[str, tuple, str]]:
    """(key, what it may be, why).

    A weight's codes and scales stand in the file; an activation's the kernels find.
    """
    weight = format.role == "weight"
    yield "pad", ("error",), "groups divide the width"
    if isinstance(format, NVFP4) and not (weight and pseudo):
        yield (
            "global_scale",
            ("fixed", "none"),
            "transformers loads global scales as bfloat16, which rounds one of an amax",
        )
        g = format.global_from_amax(torch.zeros(1))
        if g.bfloat16() != g:
            yield (
                "fixed_decode_scale",
                (2.0**-10 if weight else 2.0**-3,),
                "its reciprocal is no bfloat16 number",
            )
    if not weight:
        yield "observer", ("minmax",), "ranges at run time are the extremes"
        yield "compute_dtype", ("float32",), "scales at run time are computed in float32"
        ties = "zero" if pseudo else "even"
        yield (
            "fp4_ties",
            (ties,),
            f"ties at run time go to {ties} with export.pseudo={str(pseudo).lower()}",
        )
        if isinstance(format, MX):
            yield "mx_scale", ("fpquant",), "scales at run time are of that kind"


def refuse(field: str, value: object, why: str, way_out: str) -> NoReturn:
    """Raise a ConfigError that names both fields and the way out."""
    raise ConfigError(
        f"{field}={value} with export=fp_quant: {why}; {way_out}, or use export=harness."
    )


def _check_overrides(scheme: Scheme, online: bool) -> None:
    """Refuse single linears of another format. online: whether a matrix runs in front of them."""
    common = (scheme.weight, scheme.act)
    unquantized = (None, None)
    for (layer, name), parts in scheme.overrides.items():
        legal = [common] if online else [common, unquantized]
        if layer is None:
            legal = [unquantized]
        formats = (scheme.part("weight", layer, name), scheme.part("act", layer, name))
        if formats not in legal:
            refuse(
                "format.overrides",
                f"{name}: {', '.join(parts)}",
                "a linear of the blocks has the one format, or none "
                "where no matrix runs in front of it",
                "drop it there",
            )


def _order(online: Sequence[Transform], context: ModelShape, kind: type[Format]) -> int | None:
    """The order of the blocks at run time, None where there are none.

    Raises ConfigError for what is no such block.
    """
    for transform in online:
        held = isinstance(transform, HadamardBlocks | SequencyBlocks | Wush)
        if len(online) > 1 or not held or not _single(transform):
            refuse(
                "transform",
                transform.name,
                f"{', '.join(transform.leaves(context))} would have to run online, where the "
                "layout has one block matrix at every site",
                "use transform=hadamard, transform=gsr, transform=wush with transform.share=blocks "
                "and transform.merge=false",
            )
        if isinstance(transform, Wush):
            orders = {transform.order(context)}
        else:
            orders = set(transform.orders(context.widths).values())
        if len(orders) > 1 or not orders <= set(ORDERS[kind]):
            fitting = [order for order in common_blocks(context.widths) if order in ORDERS[kind]]
            way_out = "none divides every site; use transform=identity"
            if fitting:
                way_out = f"set transform.block_size={fitting[0]}"
            refuse(
                "transform.block_size",
                transform.block_size,
                f"all sites have one of the blocks {ORDERS[kind]}",
                way_out,
            )
        return orders.pop()
    return None


def _single(transform: Transform) -> bool:
    """Whether all blocks of a site have one matrix, and every site has one online."""
    if isinstance(transform, Wush):
        return transform.share != "none" and not transform.merge
    return True
