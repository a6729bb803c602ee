"""Reads FP-Quant's checkpoint (fp_quant.py has its table) where its kernels do not run.

transformers wants a GPU for it; here the weights are decoded by the table, into linears with H and
a quantizer in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.codecs.codec import Blocks
from harness.formats import MX, NVFP4
from harness.models.offload import assign
from harness.models.quant_linear import QuantLinear, SiteInput
from harness.models.weights import weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MATRIX = "forward_hadamard_matrix"
ENTRIES = (  # what is read
    "qweight",
    "scales",
    "dqweight",
    "weight_global_scale",
    "act_global_scale",
    MATRIX,
    "bias",
)


@torch.no_grad()
def read(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model in a folder of this layout, computing in dtype, without KV cache."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    # with it transformers would look for kernels
    quantization = vars(config).pop("quantization_config")
    tensors = {
        name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, module in list(model.named_modules()):
        if f"{name}.{MATRIX}" in tensors:
            entries = {
                entry: tensors[f"{name}.{entry}"].to(device)
                for entry in ENTRIES
                if f"{name}.{entry}" in tensors
            }
            model.set_submodule(name, _linear(entries, quantization, dtype))
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # the rotary table, which is in no file
            model.set_submodule(name, type(module)(config=config).to(device))
    for name, _ in list(model.named_parameters()):
        assign(model, name, tensors[name].to(device, dtype, copy=True))
    model.tie_weights()  # where its config says so
    model.config.use_cache = False
    return model.eval()


def decoded(qweight: Tensor, scales: Tensor, g: Tensor) -> Tensor:
    """The weight [out, in], float32, of packed codes, scales' bits and the global scale."""
    codes = torch.stack([qweight & 15, qweight >> 4], dim=-1).flatten(-2).long()
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=codes.device)
    elements = torch.cat([grid, -grid])[codes].unflatten(-1, (scales.shape[-1], -1))
    kind = torch.float8_e4m3fn if elements.shape[-1] == 16 else torch.float8_e8m0fnu
    return (elements * (scales.view(kind).float() / g.float()).unsqueeze(-1)).flatten(-2)


def _linear(
    entries: Mapping[str, Tensor], quantization: Mapping, dtype: torch.dtype
) -> QuantLinear:
    """A linear with its matrix and its quantizer in front.

    entries: the file's tensors of it. quantization: the file's quantization_config.
    """
    pseudo = quantization["pseudoquantization"]
    if pseudo:
        weight = entries["dqweight"]
    else:
        weight = decoded(entries["qweight"], entries["scales"], entries["weight_global_scale"])
    ties = "zero" if pseudo else "even"
    site = SiteInput(1)
    site.codec = Blocks(entries[MATRIX].float())
    if quantization["forward_dtype"] == "nvfp4":
        site.format = NVFP4(scope="static", role="activation", fp4_ties=ties)
        site.global_scale = entries["act_global_scale"].float()
    else:
        site.format = MX(mx_scale="fpquant", role="activation", fp4_ties=ties)
    bias = entries["bias"].to(dtype) if "bias" in entries else None
    return QuantLinear(weight.bfloat16().to(dtype), bias, site)
