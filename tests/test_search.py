"""Scales under the Hessian, against brute force over all codes in float64."""

from dataclasses import replace

import pytest
import torch
from composed import run

from harness.calibration.statistics import Statistics
from harness.config.build import option
from harness.config.errors import ConfigError
from harness.formats import FP4, MX, NVFP4, Format, FourOverSix, Integer, Scales
from harness.formats.grids import E4M3
from harness.models.adapter import Adapter
from harness.models.merge import swap
from harness.models.tiny import Tiny
from harness.quantize.allocation import auto_of, sensitivities
from harness.solvers import RTN, Problem
from harness.solvers.search import diagonal_blocks, under_hessian

NEAR = {"rtol": 1e-5, "atol": 1e-5}
INT4 = Integer(granularity="group", group_size=32, observer="hessian")
FORMATS = {
    "nvfp4": NVFP4(observer="hessian"),
    "nvfp4_diagonal": NVFP4(observer="hessian_diagonal"),
    "mxfp4": MX(observer="hessian"),
    "mxfp8_even": MX(bits=8, element="e4m3", mx_scale="even", observer="hessian"),
    "fp4": FP4(observer="hessian"),
    "int4": INT4,
    "int4_channel": Integer(observer="hessian"),
    "int4_asym": replace(INT4, symmetric=False),
    "int4_asym_auto": replace(INT4, symmetric=False, incl0="always", scale_dtype="bf16"),
    "int4_offset": replace(INT4, symmetric=False, zp="float_offset"),
    "int4_padded": replace(INT4, pad="zero", group_size=40),
}


def drawn(rows=24, width=96, seed=0):
    """A weight, and a Hessian whose features are not alike."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=random) * 0.02
    mixing = torch.randn(width, width, generator=random) * torch.rand(width, generator=random)
    x = torch.randn(400, width, generator=random) @ mixing
    return weight, 2 / len(x) * x.T @ x


def extremes(format: Format, weight):
    return format.scales(weight, global_scale=format.global_from_amax(weight.abs().amax()))


def error(format: Format, weight, scales: Scales, hessian, diagonal=False):
    """e^T H_b e of every group [rows, groups], float64, block after block."""
    rounded = format.quantize(weight, scales).dequantize()
    noise = format.split(rounded.double() - weight.double())
    size = noise.shape[-1]
    errors = []
    for group in range(noise.shape[1]):
        e = noise[:, group]
        count = min(size, len(hessian) - group * size)
        part = slice(group * size, group * size + count)
        block = hessian[part, part].double()
        if diagonal:
            block = block.diagonal().diag()
        errors.append(torch.einsum("ri,ij,rj->r", e[:, :count], block, e[:, :count]))
    return torch.stack(errors, 1)


@pytest.mark.parametrize("name", FORMATS)
def test_no_group_is_worse_than_with_its_extremes(name):
    weight, hessian = drawn()
    format = FORMATS[name]
    diagonal = format.observer == "hessian_diagonal"
    start = extremes(format, weight)
    found = under_hessian(weight, format, start, hessian)
    assert {k: t.dtype for k, t in found.tensors().items()} == {
        k: t.dtype for k, t in start.tensors().items()
    }
    before = error(format, weight, start, hessian, diagonal)
    after = error(format, weight, found, hessian, diagonal)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.95 * before.sum()


@pytest.mark.parametrize("diagonal", [False, True], ids=["blocks", "diagonal"])
def test_an_e4m3_scale_is_the_best_of_all_126(diagonal):
    weight, hessian = drawn(rows=64)
    format = FORMATS["nvfp4_diagonal" if diagonal else "nvfp4"]
    start = extremes(format, weight)
    found = under_hessian(weight, format, start, hessian)
    codes = torch.arange(1, 127, dtype=torch.uint8)
    errors = torch.stack(
        [
            error(
                format,
                weight,
                replace(
                    start,
                    scale=torch.full_like(start.scale.view(torch.uint8), code).view(
                        torch.float8_e4m3fn
                    ),
                ),
                hessian,
                diagonal,
            )
            for code in codes.tolist()
        ]
    )
    best = errors.amin(0)
    mine = error(format, weight, found, hessian, diagonal)
    near = mine <= best * (1 + 1e-4)
    assert near.float().mean() > 0.98  # codes further off win in .4 % of the blocks of a model
    # codes -4 .. +10 from that of the extremes are tried, and none of them is better
    before = start.scale.view(torch.uint8).int()
    tried = [each.scale.view(torch.uint8).int() for each in format.nearby(start)]
    steps = (-1, 1, -2, 2, -3, 3, -4, 4, *range(5, 11))
    for step, code in zip(steps, tried, strict=True):
        assert torch.equal(code, (before + step).clamp(1, 126))
    away = codes[:, None, None].int() - before
    inside = (away >= -4) & (away <= 10)
    assert (mine <= errors.where(inside, torch.inf).amin(0) * (1 + 1e-4)).all()
    assert E4M3.decode(found.scale.view(torch.uint8)).isfinite().all()


def test_a_power_of_two_is_the_best_of_all():
    weight, hessian = drawn(rows=64)
    format = FORMATS["mxfp4"]
    start = extremes(format, weight)
    found = under_hessian(weight, format, start, hessian)
    errors = torch.stack(
        [
            error(format, weight, Scales(torch.full_like(start.scale, code)), hessian)
            for code in range(100, 140)
        ]
    )
    assert (error(format, weight, found, hessian) <= errors.amin(0) * (1 + 1e-4)).all()
    assert (found.scale != start.scale).any()


@pytest.mark.parametrize("name", ["int4_asym", "int4_offset"])
def test_ranges_of_integers_move_at_either_end(name):
    """Against all ranges whose ends lie on a grid of 25ths of what they were."""
    weight, hessian = drawn(rows=8)
    format = FORMATS[name]
    start = extremes(format, weight)
    found = under_hessian(weight, format, start, hessian)
    low, high = format.split(weight).amin(-1), format.split(weight).amax(-1)
    best = error(format, weight, start, hessian)
    for below in torch.linspace(0.2, 1, 21):
        for above in torch.linspace(0.2, 1, 21):
            lo, hi = low * below, high * above
            scale = (hi - lo) / 15
            zero = lo if name == "int4_offset" else (-lo / scale).round()
            best = best.minimum(error(format, weight, Scales(scale, zero), hessian))
    mine = error(format, weight, found, hessian)
    before = error(format, weight, start, hessian)
    # of what moving both ends freely can gain, moving one or both alike gains two thirds
    assert (before - mine).sum() > 0.65 * (before - best).sum()


def test_ties_stay_with_the_extremes():
    weight, _ = drawn()
    for format in FORMATS.values():
        start = extremes(format, weight)
        found = under_hessian(weight, format, start, torch.zeros(96, 96))
        for key, tensor in start.tensors().items():
            assert torch.equal(found.tensors()[key].view(torch.uint8), tensor.view(torch.uint8))


def test_blocks_of_the_diagonal_are_enough():
    weight, _ = drawn()
    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(3))
    whole, blocks = (Statistics(96, 300, "cpu", curvature) for curvature in (96, 32))
    for statistics in (whole, blocks):
        statistics.add(x[:100])
        statistics.add(x[100:])
        statistics.finish()
    assert whole.hessian is not None
    assert blocks.hessian is not None
    assert blocks.hessian.shape == (3, 32, 32)
    torch.testing.assert_close(blocks.hessian, diagonal_blocks(whole.hessian, 32), **NEAR)
    torch.testing.assert_close(
        diagonal_blocks(blocks.hessian, 16), diagonal_blocks(whole.hessian, 16), **NEAR
    )
    torch.testing.assert_close(
        whole.hessian.double(), 2 / 300 * x.T.double() @ x.double(), check_dtype=False, **NEAR
    )
    formats = {"a": FORMATS["nvfp4"], "b": INT4}
    assert RTN().curvature(formats.values(), 96) == 32
    assert RTN().curvature([FORMATS["int4_channel"]], 96) == 96
    assert RTN().curvature([FORMATS["int4_padded"]], 96) == 96
    assert RTN().curvature([NVFP4()], 96) == 0
    weights = dict.fromkeys(formats, weight)
    some, all_ = (
        RTN().solve(Problem(weights, formats, statistics.hessian)).qtensors
        for statistics in (blocks, whole)
    )
    for name in weights:
        assert torch.equal(some[name].codes, all_[name].codes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NVFP4(observer="hessian", role="activation"), "is for weights"),
        (lambda: Integer(granularity="tensor", observer="hessian"), "granularity=tensor"),
        (lambda: FourOverSix(observer="hessian"), "only observer=minmax"),
    ],
)
def test_formats_refuse_it_where_it_means_nothing(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["solver=adascale"], "without a Hessian"),
        (["solver=minmax"], "without a Hessian"),
        (["solver=gptq", "solver.scales=dynamic"], "made once"),
    ],
)
def test_solvers_refuse_it_where_it_means_nothing(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, "format=int4", "format.weight.observer=hessian", *settings)


@pytest.mark.parametrize(
    "settings",
    [
        ["solver=rtn"],
        ["solver=gptq", "solver.order=activation", "solver.hessian_input=quantized"],
        ["solver=awq"],
        ["solver=rtn", "format.overrides={lm_head:nvfp4}"],
    ],
)
def test_runs_end_better_than_with_extremes(tmp_path, settings):
    def layers(observer):
        outcome = run(tmp_path, "format=nvfp4", f"format.weight.observer={observer}", *settings)
        assert outcome.status == "done", outcome.error
        assert not [w for w in outcome.metrics["warnings"] if "hessian" in w]
        return sum(layer["rel_error"] for layer in outcome.metrics["layers"])

    assert layers("hessian") < layers("minmax")


def test_an_allocation_measures_the_scales_that_will_be(tmp_path):
    outcome = run(
        tmp_path,
        "format=auto",
        "format.weight.observer=hessian",
        "solver=rtn",
        "format.act.bits=16",
    )
    assert outcome.status == "done", outcome.error
    assert sum(outcome.metrics["notes"]["allocation"].values()) == 14
    adapter = Adapter(Tiny().load()[0])
    swap(adapter)
    section = {"bits_per_weight": 4.5, "candidates": ["int3", "nvfp4", "mxfp4"]}
    weight = option("format", "auto")["weight"]
    ids = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    best, plain = (
        sensitivities(adapter, auto_of(section, weight | {"observer": kind}), ids, lambda: None)
        for kind in ("hessian", "minmax")
    )
    for row, other in zip(best, plain, strict=True):
        for name, error in row["errors"].items():
            assert error < other["errors"][name], (row["layer"], row["name"], name)
