"""The tensors of a compressed-tensors file hold every code and every scale, as its own library
packs and unpacks them."""

import re

import pytest
import torch
from compressed import mx, weight
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme
from references.integers import compressed_tensors_format
from safetensors import safe_open

from harness.checkpoints import entries, layouts
from harness.config.errors import DataError
from harness.formats import MX, NVFP4, FourOverSix, QTensor, Scales


@pytest.mark.parametrize(
    "reference", ["nvfp4", "mxfp4", "int4_sym_group32", "int4_asym_group64", "int4_sym_channel"]
)
def test_golden_entries(golden_dir, reference):
    with safe_open(golden_dir / "packed_checkpoints.safetensors", "pt") as file:
        keys = [key for key in file.keys() if f"/{reference}" in key]  # noqa: SIM118
        golden = {key: file.get_tensor(key) for key in keys}
        inputs = {
            case: file.get_tensor(f"{case}/x") for case in {key.split("/")[0] for key in keys}
        }
    cases = {key.rpartition("/")[0] for key in keys}
    assert cases
    for case in cases:
        kind = case.split("/")[1]
        if kind == "nvfp4":
            format, layout = NVFP4(compute_dtype="input"), "nvfp4-pack-quantized"
        elif kind == "mxfp4":
            format, layout = MX(mx_scale="even", compute_dtype="input"), "mxfp4-pack-quantized"
        else:
            parts = re.fullmatch(r"int(\d)_(sym|asym)_(group|channel)(\d*)", kind).groups()
            format, layout = compressed_tensors_format(*parts), "pack-quantized"
        q = format.quantize(inputs[case.split("/")[0]])
        for name, tensor in entries.weight_entries(q, layout).items():
            wanted = golden[f"{case}/{name}"]
            wanted = (
                wanted.bfloat16() if tensor.dtype == torch.bfloat16 else wanted.view(tensor.dtype)
            )
            assert torch.equal(tensor.float(), wanted.view(tensor.shape).float()), f"{case}/{name}"


@pytest.mark.parametrize("bits", range(2, 9))
def test_words(bits):
    low = 2 ** (bits - 1)
    codes = torch.randint(
        -low, low, (5, 77), generator=torch.Generator().manual_seed(bits), dtype=torch.int8
    )
    assert torch.equal(entries.pack_words(codes, bits), pack_to_int32(codes, bits))
    assert torch.equal(
        entries.pack_words(codes.T, bits).T, pack_to_int32(codes, bits, packed_dim=0)
    )


def decoded(q: QTensor) -> torch.Tensor:
    """The weight that compressed-tensors makes of a QTensor's entries."""
    kind = layouts.layout(q.format, None, alone=True)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=layouts.described(q.format), format=kind
    )
    return BaseCompressor.get_value_from_registry(kind).decompress(
        entries.weight_entries(q, kind), scheme
    )["weight"]


@pytest.mark.parametrize("element", ["e2m1", "e2m3", "e4m3"])
def test_every_block_scale_and_every_element_is_held(element):
    format = mx(element)
    codes = torch.arange(2**format.bits, dtype=torch.uint8)[
        ~format.grid.decode(torch.arange(2**format.bits)).isnan()
    ]
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % 32)).expand(254, -1).contiguous()
    scale = (
        torch.arange(1, 255, dtype=torch.uint8)
        .view(-1, 1)
        .expand(-1, codes.shape[-1] // 32)
        .contiguous()
    )
    q = QTensor(codes, Scales(scale), format, torch.bfloat16)
    assert torch.equal(decoded(q), q.dequantize())


def test_fouroversix_decodes_to_its_values_or_is_refused():
    """Its own decoding rounds otherwise; what bfloat16 weights decode to often lies on a tie, which
    then falls either way."""
    held = {torch.float32: 0, torch.bfloat16: 0}
    for dtype in held:
        for seed in range(40):
            q = FourOverSix().quantize(
                torch.randn(32, 256, generator=torch.Generator().manual_seed(seed)).to(dtype)
            )
            try:
                assert torch.equal(decoded(q), q.dequantize().bfloat16()), seed
                held[dtype] += 1
            except DataError as error:
                assert "use export=harness" in str(error)
    assert held[torch.float32] == 40
    assert 20 < held[torch.bfloat16] < 40


def test_small_scales_of_a_float16_model_are_held_by_both_dtypes():
    """A row of small weights has a scale among the subnormals of float16."""
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    w = (noise * torch.exp2(-torch.arange(64.0) / 3).view(-1, 1)).half()
    for bits in (4, 8):
        scale = weight(bits).scales(w).scale
        assert scale.min() < 2**-17
        assert torch.equal(scale.half().bfloat16(), scale)
