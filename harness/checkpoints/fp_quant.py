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
not orthogonal (WUSH's, one for all blocks of a site) are held. Floats are bfloat16, which
transformers takes for this layout; 1 / sqrt(b) is exact in it for b = 16 and 64 only.
fp_quant_layout.py refuses what the layout cannot hold.

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

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.checkpoints.base import Exporter, Snapshot, modules, weight_at, weight_format
from harness.checkpoints.fp_quant_layout import KINDS, check
from harness.checkpoints.fp_quant_reader import MATRIX, read
from harness.codecs.codec import Blocks, Rotation
from harness.config.checks import boolean
from harness.config.errors import ConfigError
from harness.formats import MX, Format, QTensor, Scheme, pack_nibbles
from harness.models.quant_linear import QuantLinear
from harness.transforms import Codec, ModelShape, Transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        return check(scheme, transforms, context, self.pseudo)

    def tensors(self, snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
        for name, module in modules(snapshot.adapter):
            q = snapshot.qtensors.get(name)
            if q is not None:
                assert isinstance(module, QuantLinear), "only linears are quantized in this layout"
                for entry, tensor in self._entries(module, q).items():
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

    def _entries(self, module: QuantLinear, q: QTensor) -> dict[str, Tensor]:
        """{entry: tensor} of one quantized linear, its bias apart."""
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


def _kind(codec: Codec | None) -> str:
    """FP-Quant's name of the matrix: a loader reads the file's, who quantizes anew needs a word."""
    if codec is None:
        return "identity"
    # WUSH has no word there
    return "gsr" if isinstance(codec, Blocks) and codec.decoder is None else "hadamard"


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
