"""The formats against golden vectors of public reference libraries: tests/golden, or any such
folder with --golden DIR.

Each file holds `<case>/x` and `<case>/<reference>/<what>`. A reference is matched to the project's
format that must agree with it, either in every bit (`exactly`) or, where the reference works in
another order of arithmetic, up to ties and the last bit of float32 (`nearly`). References this file
does not know are skipped by name.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from harness.checkpoints.entries import pack_words
from harness.formats import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    FP4,
    FP8,
    IF4,
    MSE,
    MX,
    NVFP4,
    FourOverSix,
    Integer,
    Scales,
    absmax,
    error,
    straight_through,
    unpack_nibbles,
)

GRIDS = {"e2m1": E2M1, "e2m3": E2M3, "e3m2": E3M2, "e4m3": E4M3}
FILES = (
    "casts",
    "fouroversix",
    "fp8",
    "fpquant",
    "if4",
    "int_compressed_tensors",
    "int_quarot_spinquant",
    "mse_llmcompressor",
    "mxfp4",
    "mxfp8_mxfp6",
    "nvfp4",
    "packed_checkpoints",
)


def pytest_generate_tests(metafunc):
    if {"file", "case", "reference"} <= set(metafunc.fixturenames):
        folder = Path(metafunc.config.getoption("--golden") or Path(__file__).parent / "golden")
        metafunc.parametrize(
            ("file", "case", "reference"),
            [(path, *row) for path in sorted(folder.glob("*.safetensors")) for row in rows(path)],
            ids=lambda v: getattr(v, "stem", v),
        )


def rows(path):
    with safe_open(path, "pt") as f:
        keys = [key.split("/") for key in f.keys()]  # noqa: SIM118
        return sorted({tuple(key[:2]) for key in keys if len(key) == 3})


def test_folder_is_there(golden_dir):
    assert golden_dir.is_dir(), f"no golden vectors in {golden_dir}"
    assert list(golden_dir.glob("*.safetensors")), f"no .safetensors file in {golden_dir}"


@pytest.mark.parametrize("name", FILES)
def test_file_is_there(golden_dir, name):
    if not (golden_dir / f"{name}.safetensors").exists():
        pytest.skip(f"{golden_dir} has no {name}.safetensors")
    assert rows(golden_dir / f"{name}.safetensors")


def test_reference(file, case, reference):
    checks = [
        (match, check)
        for pattern, check in REFERENCES.get(file.stem, ())
        if (match := re.fullmatch(pattern, reference))
    ]
    if not checks:
        pytest.skip(f"{file.name}: reference {reference} is not one this project follows")
    with safe_open(file, "pt") as f:
        prefix = f"{case}/{reference}/"
        golden = {
            key.removeprefix(prefix): f.get_tensor(key)
            for key in f.keys()  # noqa: SIM118
            if key.startswith(prefix)
        }
        x = f.get_tensor(f"{case}/x")
    for match, check in checks:
        grid = {"grid": case} if check is cast else {}
        check(x, golden, **match.groupdict(), **grid)


# comparisons


def exactly(got, want, what):
    """Equal shapes and values; NaN equals NaN."""
    got, want = got.double(), want.double().reshape(got.shape)
    wrong = (got != want) & ~(got.isnan() & want.isnan())
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, "
        f"first {got[wrong][:3]} != {want[wrong][:3]}"
    )


def nearly(x, got, want, what, unlimited=False):
    """Equal up to the last float32 bit; or x, of bf16 data, lies halfway between the two (0.12 % of
    the elements)."""
    off = (got - want).abs() > 1e-6 * torch.maximum(got.abs(), want.abs())
    tie = ((x.float() - got).abs() - (want - x.float()).abs()).abs() <= 1e-5 * x.float().abs()
    assert not (off & ~tie).any(), (
        f"{what}: {int((off & ~tie).sum())} of {off.numel()} differ and are no ties"
    )
    allowed = (
        0
        if x.dtype == torch.float32
        else off.numel()
        if unlimited
        else max(2, 0.0012 * off.numel())
    )
    assert off.sum() <= allowed, (
        f"{what}: {int(off.sum())} of {off.numel()} ties fall the other way"
    )


def blockwise(x, group):
    return x.reshape(*x.shape[:-1], -1, group)


# exact references


def check_format(format, x, golden):
    """Scales, zero points and global scale, then dq through codes and through the fast path."""
    q = format.quantize(x)
    if "scale" in golden:
        raw = golden["scale"].dtype == torch.uint8
        scale = (
            q.scales.scale.view(torch.uint8)
            if raw
            else format.lattice(q.scales, golden["scale"].dtype)[0]
        )
        exactly(scale, golden["scale"], "scale")
    if "zero_point" in golden and q.scales.zero is not None:
        exactly(q.scales.zero, golden["zero_point"], "zero point")
    if "global_scale" in golden:
        exactly(q.scales.global_scale, golden["global_scale"], "global scale")
    exactly(q.dequantize(), golden["dq"], "dq")
    exactly(format.fake(x), golden["dq"], "fake")


def check_searched(format, x, golden):
    """As check_format, but a group may have taken another candidate of equal error."""
    q = format.quantize(x)
    scale = format.lattice(q.scales, x.dtype)[0]
    other = ((scale != golden["scale"]) & ~(scale.isnan() & golden["scale"].isnan())).unsqueeze(-1)
    theirs = format.quantize(
        x, Scales(golden["scale"], golden["zero_point"].float() if "zero_point" in golden else None)
    )
    group = x.shape[-1] // scale.shape[-1]
    blocks, ours, dq = (
        blockwise(t.float(), group) for t in (x, q.dequantize(), theirs.dequantize())
    )
    e, e_theirs = error(blocks, ours, format.mse.norm), error(blocks, dq, format.mse.norm)
    torch.testing.assert_close(
        e.masked_fill(~other[..., 0], 0), e_theirs.masked_fill(~other[..., 0], 0), rtol=1e-6, atol=0
    )
    want = blockwise(golden["dq"], group)
    exactly(
        torch.where(other, want, blockwise(format.fake(x, ste=golden.get("ste", False)), group)),
        want,
        "fake",
    )


def compressed_tensors_int(x, golden, bits, kind, granularity, group):
    check_format(compressed_tensors_format(bits, kind, granularity, group), x, golden)


def compressed_tensors_format(bits, kind, granularity, group):
    return Integer(
        bits=int(bits),
        symmetric=kind == "sym",
        granularity=granularity,
        group_size=int(group) if group else None,
        int_scale="half_range",
        zp_order="add_then_round",
        zp_range="signed",
        incl0="always",
        degenerate="eps",
        compute_dtype="input",
    )


def quarot(x, golden, part, bits, kind, clip, granularity, group, mse):
    format = Integer(
        bits=int(bits),
        symmetric=kind == "sym",
        granularity=granularity,
        group_size=int(group) if group else None,
        clip=float(clip or 1),
        incl0="always" if part == "w" else "auto",
        role="weight" if part == "w" else "activation",
        observer="mse" if mse else "minmax",
        compute_dtype="input" if part == "a" and group else "float32",
    )
    (check_searched if mse else check_format)(format, x, golden)


def fpquant(x, golden, kind, observer):
    shared = {
        "observer": observer,
        "mse": MSE(shrink="scale"),
        "compute_dtype": "input",
        "role": "activation",
    }
    if kind == "mxfp4":
        format = MX(mx_scale="fpquant", **shared)
    elif kind.startswith("fp4"):
        format = FP4(group_size=int(kind.partition("group")[2]), **shared)
    else:
        symmetric, group = re.fullmatch(r"int4_(sym|asym)_group(\d+)", kind).groups()
        format = Integer(
            symmetric=symmetric == "sym",
            granularity="group",
            group_size=int(group),
            int_scale="half_range",
            zp_order="add_then_round",
            incl0="never",
            degenerate="one",
            **shared,
        )
    q = format.quantize(x)
    if observer == "mse" and kind != "mxfp4":
        check_searched(format, x, {**golden, "ste": True})
        return
    exactly(format.lattice(q.scales, x.dtype)[0], golden["scale"], "scale")
    if q.scales.zero is not None:
        exactly(q.scales.zero, golden["zero_point"], "zero point")
    exactly(straight_through(x, q.dequantize()), golden["dq"], "dq")
    exactly(format.fake(x, ste=True), golden["dq"], "fake")


def compressed_tensors_nvfp4(x, golden, math):
    check_format(
        NVFP4(compute_dtype="float32" if math else "input"), x.to(golden["dq"].dtype), golden
    )


def fouroversix(x, golden, choose):
    format = FourOverSix(choose=choose)
    exactly(format.scales(x.float()).global_scale, golden.pop("amax"), "amax")
    check_format(format, x.float(), golden)


def if4(x, golden, choose):
    """Exact, the choice too, but under E4M3-subnormal scales: they let a quotient pass 6, which the
    reference does not clamp, so that FP4 reaches 8 there."""
    format = IF4(choose=choose)
    q = format.quantize(x.float())
    exactly(q.scales.global_scale, golden["amax"], "amax")
    ours, theirs = q.scales.scale.view(torch.uint8), golden["scale"]
    exactly(ours & 0x7F, theirs & 0x7F, "scale")
    held = (theirs & 0x7F == 0) | (theirs & 0x7F >= 0x08)
    exactly(ours[held], theirs[held], "choice")
    held = held.repeat_interleave(16, dim=-1)
    exactly(q.dequantize()[held], golden["dq"][held], "dq")
    exactly(format.fake(x.float()), q.dequantize(), "fake")


# FP8


def fp8(x, golden, element, part, granularity, group):
    format = FP8(
        element=element,
        granularity=granularity,
        group_size=int(group) if group else None,
        role="weight" if part == "w" else "activation",
        compute_dtype="input",
        scale_dtype="input",
    )
    q = format.quantize(x)
    exactly(q.scales.scale.flatten(), golden["scale"].flatten(), "scale")
    if "code" in golden:  # but of a zero, whose sign is lost there where a quotient underflows
        some = golden["code"] & 0x7F != 0
        exactly(q.codes[some], golden["code"][some], "code")
        exactly(q.codes[~some] & 0x7F, golden["code"][~some] & 0x7F, "code of zero")
    exactly(q.dequantize(), golden["dq"], "dq")
    exactly(format.fake(x), golden["dq"], "fake")


def fp8_unit(x, golden, element):
    format = FP8(element=element, granularity="tensor", range="unit", role="activation")
    exactly(format.fake(x), golden["dq"], "fake")
    some = x != 0  # others keep the sign of -0.0
    exactly(format.quantize(x).codes[some], golden["code"][some], "code")


# MX


def mx_format(element, rule):
    bits = {"e2m1": 4, "e2m3": 6, "e3m2": 6, "e4m3": 8, "e5m2": 8}[element]
    return MX(element=element, bits=bits, mx_scale=rule)


def mx_exact(x, golden, rule, element="e2m1"):
    check_format(mx_format(element, rule), x.float(), golden)


def mx_compressed_tensors(x, golden, element="e2m1"):
    mbits = 1 if element == "e4m3" else "element"
    check_format(
        replace(mx_format(element, "even"), mx_even_mbits=mbits, compute_dtype="input"), x, golden
    )


def mx_torchao(x, golden, rule, element="e2m1"):
    """Exact; at k = 0 torchao divides by another scale (2^-126, with rceil 1) than it multiplies
    with. torchao's rceil scale may be one low, where amax / max is within a few ulp above a power
    of two."""
    x, format, theirs = x.float(), mx_format(element, rule), golden["scale"]
    scales = format.scales(x)
    low = scales.scale.int() - theirs.int()
    exactly(
        torch.where(low == 1, theirs, scales.scale) if rule == "rceil" else scales.scale,
        theirs,
        "scale",
    )
    if (low == 1).any():
        (power,) = format.lattice(Scales(theirs))
        peak = absmax(blockwise(x, 32)) / format.grid.max
        assert (peak <= power * (1 + 2**-20))[low == 1].all(), (
            "a scale differs away from a power of two"
        )
    divide = torch.where(theirs == 0, 127 if rule == "rceil" else 1, theirs).to(torch.uint8)
    exactly(format.decode(format.encode(x, Scales(divide)), Scales(theirs)), golden["dq"], "dq")
    ordinary = ((theirs > 0) & (low == 0)).repeat_interleave(32, dim=-1)
    exactly(torch.where(ordinary, format.fake(x), golden["dq"]), golden["dq"], "fake")


def mx_fouroversix(x, golden):
    """Exact but for NaN on all-zero blocks, and code 1 where the scale would be 2^-127."""
    x, format, theirs = x.float(), MX(mx_scale="rceil"), golden["scale"]
    scales = format.scales(x)
    tiny = scales.scale == 0
    exactly(scales.scale[~tiny], theirs[~tiny], "scale")
    zero = (absmax(blockwise(x, 32)) == 0).repeat_interleave(32, dim=-1)
    assert golden["dq"][zero].isnan().all()
    assert (theirs[tiny] <= 1).all()
    exactly(format.quantize(x, Scales(theirs)).dequantize()[~zero], golden["dq"][~zero], "dq")


def mx_modelopt(x, golden):
    """rceil scales through log2, as torchao's; every element tie toward zero."""
    x, format, theirs = x.float(), MX(mx_scale="rceil", fp4_ties="zero"), golden["scale"]
    low = format.scales(x).scale.int() - theirs.int()
    assert ((low == 0) | (low == 1)).all()
    exactly(format.quantize(x, Scales(theirs)).dequantize(), golden["dq"], "dq")


# NVFP4 in other orders of arithmetic


def same_scales(ours, theirs, floors):
    """Equal E4M3 bytes, except where a reference lifts a scale to one of its floors that we keep or
    flush."""
    ours, theirs = ours.view(torch.uint8), theirs.view(torch.uint8)
    flushed = NVFP4().scales(torch.zeros(1, 16)).scale.view(torch.uint8)
    lifted = sum(
        (theirs == floor) & ((ours < floor) | (ours == flushed)) for floor in floors
    ).bool()
    exactly(ours[~lifted], theirs[~lifted], "scale")


def nvfp4_nearly(x, golden, reference):
    """torchao never goes below 2^-6, modelopt below 2^-9 (with 1 for zero blocks); fouroversix
    keeps scales of zero, maps block maxima to 4 in static_4, and does not clamp: where a subnormal
    scale lets x reach 7, its 8 wraps to zero in four bits."""
    format = NVFP4(global_scale="none") if reference == "torchao_single_level" else NVFP4()
    ours = format.quantize(x.float())
    g = ours.scales.global_scale
    same_scales(
        ours.scales.scale,
        golden["scale"],
        {"t": (0x08,), "m": (0x01, 0x38), "f": (0x00,)}[reference[0]],
    )
    if "global_scale" in golden:
        torch.testing.assert_close(golden["global_scale"] * g, torch.ones(1), rtol=1e-6, atol=0)
    if "amax" in golden:
        exactly(absmax(x.float().flatten()), golden["amax"], "amax")
    theirs = Scales(
        golden["scale"].view(torch.float8_e4m3fn),
        None,
        g * 4 / 6 if reference == "fouroversix_static_4" else g,
    )
    got = format.quantize(x.float(), theirs).dequantize()
    if reference == "fouroversix_static_6":
        eff = (
            format.lattice(theirs)[0]
            .masked_fill(golden["scale"] >= 0x08, torch.inf)
            .repeat_interleave(16, dim=-1)
        )
        got = got.masked_fill(x.float().abs() >= 7 * eff, 0.0)
    nearly(x, got, golden["dq"], "dq", unlimited=reference == "fouroversix_static_4")


def fpquant_nvfp4(x, golden, observer):
    """Same bytes from the same g; eff = s * (1 / g) in x's dtype, and 1 where s = 0."""
    format = NVFP4(
        compute_dtype="input", observer=observer, mse=MSE(shrink="scale"), role="activation"
    )
    torch.testing.assert_close(
        format.scales(x.float()).global_scale, golden["global_scale"], rtol=1e-6, atol=0
    )
    scales = format.scales(x, global_scale=golden["global_scale"])
    flushed = golden["scale"] == 1
    (eff,) = format.lattice(scales)
    assert (absmax(blockwise(x, 16))[flushed] <= eff[flushed] / 4).all()
    last_bit = 1e-6 if x.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(
        golden["scale"][~flushed].float(), eff[~flushed], rtol=last_bit, atol=0
    )
    elements = FP4(group_size=16, compute_dtype="input", role="activation")
    dq = elements.quantize(x, Scales(golden["scale"])).dequantize()
    exactly(straight_through(x, dq), golden["dq"], "dq")


# the grid search of LLM Compressor: only the ranges it chose are on file


def llmcompressor(x, golden, kind):
    search = {"observer": "mse", "mse": MSE(maxshrink=0.2, patience=5), "compute_dtype": "input"}
    if kind == "nvfp4":
        format = NVFP4(**search)
    elif kind == "mxfp4":
        format = MX(mx_scale="even", mse_on_rounded_scale=True, **search)
    else:
        bits, symmetry, granularity, group = re.fullmatch(
            r"int(\d)_(sym|asym)_(group|channel)(\d*)", kind
        ).groups()
        format = replace(compressed_tensors_format(bits, symmetry, granularity, group), **search)
    g = NVFP4(compute_dtype="input").scales(x).global_scale
    ours = format.quantize(x, global_scale=g)
    half = format.group(x.shape[-1]) // 2
    ends = (
        torch.stack([golden["min"], golden["max"]], dim=-1)
        .flatten(-2)
        .repeat_interleave(half, dim=-1)
    )
    theirs = format.quantize(x, replace(format, observer="minmax").scales(ends, global_scale=g))
    blocks, dq, dq_theirs = (
        blockwise(t.float(), 2 * half) for t in (x, ours.dequantize(), theirs.dequantize())
    )
    e, e_theirs = error(blocks, dq, format.mse.norm), error(blocks, dq_theirs, format.mse.norm)
    same = format.lattice(ours.scales)[0] == format.lattice(theirs.scales)[0]
    exactly(dq[same], dq_theirs[same], "dq of the same range")
    torch.testing.assert_close(e[~same], e_theirs[~same], rtol=1e-6, atol=0)


# casts


def cast(x, golden, grid, reference):
    if grid not in GRIDS:
        pytest.skip(f"{grid} is not an element grid")
    grid = GRIDS[grid]
    q = grid.round_(x.clone())
    codes = grid.encode(q, x < 0)
    exactly(grid.decode(codes), q, "decode of encode")
    if "code" in golden:
        signed_zero = (x == 0) & (reference != "modelopt")  # others keep the sign of -0.0
        exactly(codes[~signed_zero], golden["code"][~signed_zero], "code")
        exactly(codes[signed_zero], golden["code"][signed_zero] % 8, "code of zero")
    if "dq" in golden:
        beyond = torch.zeros_like(x, dtype=torch.bool)
        if reference == "fouroversix":
            beyond = x.abs() >= 7
            exactly(
                golden["dq"][beyond].abs().clamp(max=grid.max),
                torch.full_like(x[beyond], grid.max),
                "unclamped values",
            )
        elif reference.endswith("unclamped"):
            beyond = golden["dq"].isnan()
            assert (x[beyond] > 464).all()
        exactly(q[~beyond], golden["dq"][~beyond], "dq")


# packed checkpoints


def packed(x, golden, kind):
    """Bytes of the file, and the weight its loader returns."""
    if kind == "nvfp4":
        format = NVFP4(compute_dtype="input")
    elif kind == "mxfp4":
        format = MX(mx_scale="even", compute_dtype="input")
    else:
        bits, symmetry, granularity, group = re.fullmatch(
            r"int(\d)_(sym|asym)_(group|channel)(\d*)", kind
        ).groups()
        format = compressed_tensors_format(bits, symmetry, granularity, group)
    q = format.quantize(x)
    if "weight_shape" in golden:
        exactly(torch.tensor(q.shape), golden["weight_shape"], "shape")
        exactly(pack_words(q.codes, format.bits), golden["weight_packed"], "packed")
        exactly(q.scales.scale, golden["weight_scale"], "scale")
        if "weight_zero_point" in golden:
            exactly(
                pack_words(q.scales.zero.T.to(torch.int8), format.bits).T,
                golden["weight_zero_point"],
                "zero point",
            )
    else:
        exactly(q.state()["codes"], golden["weight_packed"], "packed")
        exactly(unpack_nibbles(golden["weight_packed"], x.shape[-1]), q.codes, "unpacked")
        exactly(q.scales.scale.view(torch.uint8), golden["weight_scale"], "scale")
        if "weight_global_scale" in golden:
            exactly(q.scales.global_scale, golden["weight_global_scale"], "global scale")
    weight = golden["roundtrip_weight"]
    exactly(format.decode(q.codes, q.scales).to(weight.dtype), weight, "loaded weight")


REFERENCES = {
    "casts": (
        (
            r"(?P<reference>torchao|compressed_tensors|ml_dtypes|gfloat|modelopt|fouroversix"
            r"|torch_clamped|\w+_unclamped)",
            cast,
        ),
    ),
    "fouroversix": ((r"fouroversix_(?P<choose>mse|mae|abs_max)", fouroversix),),
    "fp8": (
        (
            r"compressed_tensors_(?P<element>e4m3)_(?P<part>w|a)"
            r"_(?P<granularity>tensor|channel|token|group|block)(?P<group>\d*)",
            fp8,
        ),
        (r"torch_(?P<element>e4m3|e5m2)_unit", fp8_unit),
    ),
    "if4": ((r"fouroversix_(?P<choose>mse|mae|abs_max)", if4),),
    "fpquant": (
        (
            r"fpquant_(?P<kind>mxfp4|fp4_group\d+|int4_(?:sym|asym)_group\d+)"
            r"_(?P<observer>minmax|mse)",
            fpquant,
        ),
        (r"fpquant_nvfp4_(?P<observer>minmax|mse)", fpquant_nvfp4),
    ),
    "int_compressed_tensors": (
        (
            r"compressed_tensors_int(?P<bits>\d)_(?P<kind>sym|asym)"
            r"_(?P<granularity>group|channel|tensor)(?P<group>\d*)",
            compressed_tensors_int,
        ),
    ),
    "int_quarot_spinquant": (
        (
            r"(?:quarot|spinquant)_(?P<part>w|a)_int(?P<bits>\d)_(?P<kind>sym|asym)"
            r"(?:_clip(?P<clip>[\d.]+))?"
            r"_(?P<granularity>group|channel|token)(?P<group>\d*)(?P<mse>_mse)?",
            quarot,
        ),
    ),
    "mse_llmcompressor": (
        (
            r"llmcompressor_(?P<kind>nvfp4|mxfp4|int4_(?:sym|asym)_(?:group\d+|channel))",
            llmcompressor,
        ),
    ),
    "mxfp4": (
        (r"gfloat_(?P<rule>floor)", mx_exact),
        (r"torchao_(?P<rule>floor|even|ceil|rceil)", mx_torchao),
        (r"compressed_tensors", mx_compressed_tensors),
        (r"fouroversix_rceil", mx_fouroversix),
        (r"modelopt_rceil", mx_modelopt),
    ),
    "mxfp8_mxfp6": (
        (r"mxfp\d_(?P<element>\w+)_torchao_(?P<rule>floor|rceil)", mx_torchao),
        (r"mxfp\d_(?P<element>e\dm\d)_compressed_tensors", mx_compressed_tensors),
    ),
    "nvfp4": (
        (r"compressed_tensors(?P<math>_f32math)?", compressed_tensors_nvfp4),
        (
            r"(?P<reference>torchao|torchao_single_level|modelopt|fouroversix_static_[46])",
            nvfp4_nearly,
        ),
    ),
    "packed_checkpoints": (
        (r"(?P<kind>nvfp4|mxfp4|int4_(?:sym|asym)_(?:group\d+|channel))", packed),
    ),
}
