"""fp_quant: FP-Quant's checkpoint.

Weights and inputs are both NVFP4 or both MXFP4, with one block matrix in front of every linear.

| entry                    | tensor                                                            |
|--------------------------|-------------------------------------------------------------------|
| qweight                  | uint8 [out, in / 2], even codes in the low nibbles                |
| scales                   | uint8 [out, in / group], E4M3 or E8M0 bits, row-major, not padded |
| dqweight                 | bfloat16 [out, in], instead of both where export.pseudo=true      |
| weight_global_scale      | bfloat16 [1], g: a value is q s / g                               |
| act_global_scale         | bfloat16 [1], g of the input                                      |
| forward_hadamard_matrix  | bfloat16 [b, b], H: inputs are read as x H                        |
| backward_hadamard_matrix | bfloat16 [b, b], the same                                         |

g of MX is 3 for scales of 2^k / 3, else 1.

H stands in the file and is read from there, so signs, any order of columns, and a matrix that is
not orthogonal (WUSH's, one for all blocks of a site) are held. Refused: a format alone, mixed ones,
global scales that bfloat16 rounds (transformers loads them so), inputs scaled by other rules than
those of the kernels. Floats are bfloat16, which transformers takes for this layout; 1 / sqrt(b) is
exact in it for b = 16 and 64 only.

export.pseudo=true: transformers 5.23 loads it only with ignore_mismatched_sizes=True (it takes the
absent scales to be of a wrong size), and fp_quant 0.3.2 adds a bias twice, so models with one are
refused.

Verified against both on a CPU: entries, dtypes and shapes as FPQuantLinear takes them from the
file; H; the emulating kernels, in Triton's interpreter and float32: MXFP4 to the evaluated logits,
NVFP4 on tensors. Not verified, for lack of a Blackwell GPU: the real kernels (qutlass), whose
nibbles and scales are read here as its tests read them, and vLLM. fp_quant_reader.py loads the file
back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from harness.checkpoints.base import Exporter, Snapshot, modules, weight_at, weight_format
from harness.checkpoints.fp_quant_reader import MATRIX, read
from harness.checkpoints.layouts import refuse_linears
from harness.codecs.codec import Blocks, Rotation
from harness.config.checks import boolean
from harness.config.errors import ConfigError
from harness.formats import MX, NVFP4, Format, QTensor, Scheme, pack_nibbles
from harness.models.quant_linear import QuantLinear
from harness.transforms import Codec, ModelShape, Transform
from harness.transforms.block_diagonal import common_blocks
from harness.transforms.gsr import SequencyBlocks
from harness.transforms.hadamard import HadamardBlocks
from harness.transforms.wush import Wush

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = {NVFP4: "nvfp4", MX: "mxfp4"}
ORDERS = {NVFP4: (16, 32, 64, 128), MX: (32, 64, 128)}  # hadamard_group_size


class FPQuant(Exporter):
    """The FP-Quant layout.

    pseudo: dequantized weights and emulated inputs, for GPUs without FP4 arithmetic.
    """

    name = "fp_quant"
    package = "fp-quant"
    tolerance = 0.005

    def __init__(self, pseudo: bool = False):
        self.pseudo = boolean("export.pseudo", pseudo)

    def stored(self, snapshot: Snapshot) -> torch.dtype:
        return torch.bfloat16

    def check(
        self,
        scheme: Scheme,
        transforms: Sequence[Transform],
        context: ModelShape,
        dtype: str = "auto",
    ) -> list[str]:
        refuse_linears("fp_quant", context)
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
            for key, legal, why in self._knobs(format):
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
            "export=fp_quant: loaded back by its documented layout; the kernels themselves need a "
            "GPU"
        ]
        rounded = not any(isinstance(transform, Wush) for transform in online)
        if order in (32, 128) and rounded:
            warnings.append(
                f"transform.block_size={order} with export=fp_quant: 1/sqrt({order}) is rounded to "
                "bfloat16, so inputs come out 1e-4 smaller; blocks of 16 and 64 are exact"
            )
        if self.pseudo:
            warnings.append(
                "export.pseudo=true: transformers loads it only with ignore_mismatched_sizes=True; "
                "quantized linears with biases, which fp_quant 0.3.2 adds twice, are refused when "
                "they are written"
            )
        return warnings

    def tensors(self, snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
        for name, module in modules(snapshot.adapter):
            q = snapshot.qtensors.get(name)
            if q is not None:
                assert isinstance(module, QuantLinear), "only linears are quantized in this layout"
                for entry, tensor in self._entries(name, module, q).items():
                    yield f"{name}.{entry}", tensor
            for entry, tensor in module.state_dict(keep_vars=True).items():
                if "." not in entry and not (entry == "weight" and q is not None):
                    yield f"{name}.{entry}", tensor.detach().to(torch.bfloat16, copy=True)

    def config(self, snapshot: Snapshot) -> dict:
        model = snapshot.adapter.model
        linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | QuantLinear)
        }
        # all are alike, so the first tells
        name, q = next(iter(snapshot.qtensors.items()))
        module = linears[name]
        assert isinstance(module, QuantLinear)
        format = weight_format(q)
        codec = module.site.codec
        quantization = {
            "quant_method": "fp_quant",
            "forward_dtype": KINDS[type(format)],
            "forward_method": "abs_max",
            "backward_dtype": "bf16",
            "store_master_weights": False,
            "hadamard_group_size": len(_matrix(codec, format)),
            "pseudoquantization": self.pseudo,
            "transform_init": _kind(codec),
            "modules_to_not_convert": [name for name in linears if name not in snapshot.qtensors],
        }
        return {
            "architectures": [type(model).__name__],
            "dtype": "bfloat16",
            "use_cache": True,
            "quantization_config": quantization,
        }

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        return read(folder, device, dtype)

    def weight(self, model: PreTrainedModel, name: str) -> Tensor:
        # as `load` rounds it, and the gate what it compares with
        return weight_at(model, name).bfloat16()

    def _knobs(self, format: Format) -> Iterable[tuple[str, tuple, str]]:
        """(key, what it may be, why).

        A weight's codes and scales stand in the file; an activation's the kernels find.
        """
        weight = format.role == "weight"
        yield "pad", ("error",), "groups divide the width"
        if isinstance(format, NVFP4) and not (weight and self.pseudo):
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
            ties = "zero" if self.pseudo else "even"
            yield (
                "fp4_ties",
                (ties,),
                f"ties at run time go to {ties} with export.pseudo={str(self.pseudo).lower()}",
            )
            if isinstance(format, MX):
                yield "mx_scale", ("fpquant",), "scales at run time are of that kind"

    def _entries(self, name: str, module: QuantLinear, q: QTensor) -> dict[str, Tensor]:
        """{entry: tensor} of one quantized linear, its bias apart.

        Raises ConfigError for a bias that would be added twice.
        """
        if self.pseudo and module.bias is not None:
            refuse(
                "export.pseudo",
                "true",
                f"{name} has a bias, which fp_quant 0.3.2 adds twice",
                "set export.pseudo=false",
            )
        format = weight_format(q)
        act = module.site.format
        assert act is not None, "whatever has a weight in this layout has its input in it, too"
        matrix = _matrix(module.site.codec, format).to(torch.bfloat16)
        if self.pseudo:
            values = {"dqweight": format.decode(q.codes, q.scales).to(torch.bfloat16)}
        else:
            values = {"qweight": pack_nibbles(q.codes), "scales": q.scales.scale.view(torch.uint8)}
        return values | {
            "weight_global_scale": _stored(format, q.scales.global_scale),
            "act_global_scale": _stored(act, None),
            MATRIX: matrix,
            "backward_hadamard_matrix": matrix.clone(),
        }


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


def _kind(codec: Codec | None) -> str:
    """FP-Quant's name of the matrix: a loader reads the file's, who quantizes anew needs a word."""
    if codec is None:
        return "identity"
    # WUSH has no word there
    return "gsr" if isinstance(codec, Blocks) and codec.decoder is None else "hadamard"


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


def _matrix(codec: Codec | None, format: Format) -> Tensor:
    """H [b, b] of a site, float32; without a codec the identity of the format's group."""
    if codec is None:
        assert format.group_size is not None, "a block format has one"
        return torch.eye(format.group_size)
    if isinstance(codec, Blocks) and codec.encoder is not None and codec.encoder.ndim == 2:
        return codec.encoder.float()
    if isinstance(codec, Rotation):
        return codec.matrix.dense(torch.float32)
    raise ConfigError(
        f"{type(codec).__name__} with export=fp_quant: the layout has one block matrix; use "
        "export=harness."
    )


def _stored(format: Format, global_scale: Tensor | None) -> Tensor:
    """g, bfloat16 [1]."""
    if isinstance(format, MX):
        return torch.full((1,), 3.0 if format.mx_scale == "fpquant" else 1.0, dtype=torch.bfloat16)
    g = format.global_from_amax(torch.zeros(1)) if global_scale is None else global_scale
    assert g is not None, "NVFP4 always has one"
    return g.bfloat16().reshape(1)
