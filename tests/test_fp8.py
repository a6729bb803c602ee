"""FP8 against torch's own casts, in every bit; squares of weights that share a scale, and what
solvers make of them."""

from dataclasses import replace

import pytest
import torch
from composed import composed
from number_formats import DTYPES, FP8_WEIGHTS, data, extremes, identical

from harness.config.build import build, settings
from harness.config.errors import ConfigError
from harness.formats import E4M3, E5M2, FP8, Format, QTensor
from harness.solvers import AWQ, GPTQ, RTN, Problem
from harness.solvers.rounding import Rounding

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def patterns(dtype):
    """Every bit pattern of a 16-bit float that is a number."""
    x = torch.arange(2**16).to(torch.uint16).view(dtype)
    return x[x.isfinite()].float()


@pytest.mark.parametrize("grid", [E4M3, E5M2], ids=lambda grid: grid.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_are_torchs_on_every_16_bit_number(grid, dtype):
    x = patterns(dtype)
    # halfway, and a float32 step to either side of it
    x = torch.cat([x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(-torch.inf))])
    theirs = x.clamp(-grid.max, grid.max).to(FLOAT8[grid.name])
    ours = grid.round_(x.clone())
    assert torch.equal(ours, theirs.float())
    codes = grid.encode(ours, x < 0)
    some = x != 0  # -0 has the code of 0 here
    assert torch.equal(codes[some], theirs.view(torch.uint8)[some])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("element", FLOAT8)
@pytest.mark.parametrize("granularity", FP8_WEIGHTS)
def test_elements_are_torchs_casts_of_quotients(granularity, element, dtype):
    """In float32, whatever the dtype: s = amax / max, q = cast(x / s), q s rounded once."""
    format = replace(FP8_WEIGHTS[granularity], element=element)
    w = data(71, 160, dtype=dtype)
    b = format.group_size
    height, width = {"tensor": w.shape, "channel": (1, 160), "group": (1, b), "block": (b, b)}[
        granularity
    ]
    for i in range(0, 71, height):
        for j in range(0, 160, width):
            square = w[i : i + height, j : j + width].float()
            s = square.abs().amax() / torch.full((), format.grid.max)
            q = (square / s).clamp(-format.grid.max, format.grid.max).to(FLOAT8[element])
            own = format.fake(w)[i : i + height, j : j + width]
            assert torch.equal(own, (q.float() * s).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_unit_scale_is_a_plain_cast(dtype):
    format = FP8(granularity="tensor", range="unit", role="activation")
    for x in (300 * data(3, 5, 96, dtype=dtype), *extremes(dtype).values()):
        plain = x.float().clamp(-448, 448).to(torch.float8_e4m3fn).to(dtype)
        assert torch.equal(format.fake(x), plain)
        identical(format.fake(x), format.quantize(x).dequantize())


# squares


@pytest.mark.parametrize("shape", [(128, 64), (71, 160), (64, 65), (3, 5)])
def test_squares_are_taken_apart_and_put_together(shape):
    format = FP8_WEIGHTS["block"]
    w = data(*shape)
    blocks = format.split(w)
    rows, columns = (-(-n // 64) for n in shape)
    assert blocks.shape == (rows, columns, 64 * 64)
    assert torch.equal(format.join(blocks, w.shape), w)
    for i in range(rows):
        for j in range(columns):
            square = w[64 * i : 64 * i + 64, 64 * j : 64 * j + 64]
            assert blocks[i, j].count_nonzero() == square.count_nonzero()
            assert torch.equal(blocks[i, j].sort().values[-1], square.amax().clamp(min=0))
    q = format.quantize(w)
    assert q.bits() == 8 * w.numel() + 32 * rows * columns
    back = QTensor.from_state(format, q.state(), shape, w.dtype)
    identical(back.dequantize(), q.dequantize())


def problem(format: FP8, shape=(150, 96)) -> Problem:
    w, x = data(*shape), data(400, shape[1], seed=1)
    return Problem({"w": w}, {"w": format}, hessian=2 / len(x) * x.T @ x)


def loss(task: Problem, q: QTensor) -> float:
    d = q.dequantize() - task.weights["w"]
    return ((d @ task.hessian) * d).sum().item()


@pytest.mark.parametrize("format", FP8_WEIGHTS.values(), ids=FP8_WEIGHTS)
def test_gptq_rounds_each_column_onto_its_squares_scales(format):
    task = problem(format)
    rtn = RTN().solve(task).qtensors["w"]
    for order in ("default", "activation"):
        q = GPTQ(order=order).solve(task).qtensors["w"]
        assert torch.equal(q.scales.scale, rtn.scales.scale)
        assert loss(task, q) < 0.8 * loss(task, rtn)
    # a Hessian without correlations passes nothing on
    alone = replace(task, hessian=torch.eye(96))
    assert torch.equal(GPTQ().solve(alone).qtensors["w"].codes, rtn.codes)


def test_what_shares_scales_among_rows_is_refused_or_left_alone():
    block = FP8_WEIGHTS["block"]
    with pytest.raises(ConfigError, match=r"granularity=block: the last group is short.*static"):
        GPTQ(scales="dynamic").check(block)
    task = problem(block)
    clipped = AWQ(clip=True).solve(task)
    assert clipped.report["clipped"] == 0
    assert torch.equal(clipped.qtensors["w"].codes, RTN().solve(task).qtensors["w"].codes)


def test_adascale_starts_from_the_rounded_squares():
    block = FP8_WEIGHTS["block"]
    w = problem(block).weights["w"]
    rounding = Rounding(w, block, block.scales(w))
    identical(rounding().detach(), block.fake(w))
    assert torch.equal(rounding.qtensor().codes, block.quantize(w).codes)
    rounding().square().sum().backward()
    assert rounding.gamma.grad.shape == (3, 2)


def test_weights_of_one_scale_share_the_greatest():
    """So that an engine that fuses q, k and v finds one scale."""
    format = FP8(granularity="tensor")
    weights = {"q": data(8, 32), "k": 3 * data(4, 32, seed=1)}
    solved = RTN().solve(Problem(weights, dict.fromkeys(weights, format))).qtensors
    amax = torch.stack([w.abs().amax() for w in weights.values()]).amax()
    for name, w in weights.items():
        assert solved[name].scales.scale.item() == (amax / torch.full((), 448.0)).item()
        exact = (w / (amax / 448)).to(torch.float8_e4m3fn).float() * (amax / 448)
        torch.testing.assert_close(solved[name].dequantize(), exact, rtol=1e-6, atol=0)
    apart = RTN(fuse_global_scale=False).solve(Problem(weights, dict.fromkeys(weights, format)))
    assert len({q.scales.scale.item() for q in apart.qtensors.values()}) == 2


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"granularity": "block"}, "group_size=None contradicts granularity=block"),
        ({"granularity": "block", "group_size": 64, "role": "activation"}, "block is for weights"),
        ({"range": "static", "granularity": "tensor"}, "range=static is for activations"),
        ({"range": "static", "role": "activation", "granularity": "token"}, "granularity=tensor"),
        ({"range": "unit", "granularity": "tensor", "observer": "mse"}, "observer=minmax"),
        ({"element": "e2m1"}, "element=e2m1"),
        ({"bits": 4}, "bits=4"),
        ({"symmetric": False}, "symmetric=false"),
    ],
    ids=str,
)
def test_what_fp8_cannot_be_is_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        FP8(**knobs)


# presets


@pytest.mark.parametrize(
    ("name", "weight", "act"),
    [
        ("fp8", ("channel", None), ("token", None, "dynamic")),
        ("fp8_static", ("tensor", None), ("tensor", None, "static")),
        ("fp8_block", ("block", 128), ("group", 128, "dynamic")),
        ("w4a8_fp8", ("group", 64), ("token", None, "dynamic")),
    ],
)
def test_presets(name, weight, act):
    section = settings(composed(f"format={name}")[0])["format"]
    built = [build(section[part], part, Format) for part in ("weight", "act")]
    assert (built[0].granularity, built[0].group_size) == weight
    assert (built[1].granularity, built[1].group_size, built[1].range) == act
    assert type(built[1]) is FP8
    assert built[1].element == "e4m3"
