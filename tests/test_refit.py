"""Scales chosen anew once codes are, against least squares in float64."""

import pytest
import torch
from composed import small
from test_search import FORMATS, drawn, extremes

from harness.config.errors import ConfigError
from harness.formats import FP4, Integer
from harness.pipeline.job import execute
from harness.solvers import GPTQ, Problem
from harness.solvers.refit import refit
from harness.solvers.search import diagonal_blocks

FLOAT_SCALES = {
    "int4": Integer(granularity="group", group_size=32),
    "int4_asym": Integer(granularity="group", group_size=32, symmetric=False),
    "int4_offset": Integer(granularity="group", group_size=32, symmetric=False, zp="float_offset"),
    "fp4": FP4(),
}


def rounded(format, weight):
    return format.quantize(weight, extremes(format, weight))


def error(q, weight, hessian):
    """(w - Q) H (w - Q)^T of each row, float64."""
    e = q.dequantize().double() - weight.double()
    return torch.einsum("ri,ij,rj->r", e, hessian.double(), e)


def blocked(hessian, size):
    return torch.block_diag(*diagonal_blocks(hessian, size))


@pytest.mark.parametrize("name", FORMATS)
def test_no_row_is_worse_and_codes_stay(name):
    weight, hessian = drawn()
    format = FORMATS[name]
    q = rounded(format, weight)
    found = refit(weight, format, q, hessian)
    assert torch.equal(found.codes, q.codes)
    assert found.scales.scale.dtype == q.scales.scale.dtype
    before, after = error(q, weight, hessian), error(found, weight, hessian)
    assert (after <= before * (1 + 1e-4)).all()
    if "mxfp" not in name:  # powers of two move seldom
        assert after.sum() < before.sum() * 0.98


@pytest.mark.parametrize("name", FLOAT_SCALES)
@pytest.mark.parametrize("whole", (True, False))
def test_it_goes_to_the_least_squares_of_all_groups(name, whole):
    """s of min |L (w - sum_b s_b k_b)|^2, H = L^T L; with blocks alone, the quotient of SOAR."""
    format = FLOAT_SCALES[name]
    weight, hessian = drawn(rows=6)
    q = rounded(format, weight)
    size = format.group(weight.shape[1])
    given = hessian if whole else diagonal_blocks(hessian, size)
    metric = (hessian if whole else blocked(hessian, size)).double()
    found = q
    for _ in range(200 if whole else 1):
        found = refit(weight, format, found, given)
    L = torch.linalg.cholesky(metric + 1e-12 * metric.trace() * torch.eye(len(metric))).mT
    offset = format.offset(q.scales)
    shift = torch.zeros_like(q.scales.scale) if isinstance(offset, float) else offset
    shift = shift.repeat_interleave(size, 1).double()
    unit = (q.dequantize().double() - shift) / q.scales.scale.double().repeat_interleave(size, 1)
    for row in range(len(weight)):
        k = torch.block_diag(*unit[row].view(-1, 1, size)).mT  # [n, groups]
        target = (weight[row].double() - shift[row]).unsqueeze(1)
        s = torch.linalg.lstsq(L @ k, L @ target).solution.squeeze(1)
        mine = found.scales.scale[row].double()
        e = weight[row].double() - shift[row] - k @ mine
        best = weight[row].double() - shift[row] - k @ s
        assert e @ metric @ e <= best @ metric @ best * (1 + 2e-3)
        if not whole:
            assert torch.allclose(mine, s, rtol=1e-3)


def test_gptq_loses_less_with_it():
    weight, hessian = drawn(rows=32)
    format = FORMATS["int4"]
    plain, moved = (
        GPTQ(refit=each).solved([Problem({"w": weight}, {"w": format}, hessian)])[0].qtensors["w"]
        for each in (False, True)
    )
    assert torch.equal(plain.codes, moved.codes)
    assert error(moved, weight, hessian).sum() < 0.99 * error(plain, weight, hessian).sum()


@pytest.mark.parametrize("solver", ("rtn", "gptq", "awq"))
def test_it_runs_and_lowers_the_error_of_layers(tmp_path, solver):
    errors = []
    for refitting in ("false", "true"):
        overrides = ("format=int4", f"solver={solver}", f"solver.refit={refitting}")
        cfg, choices = small(tmp_path, *overrides, "solver.sequencing=block")
        out = execute(cfg, choices)
        errors.append(sum(layer["rel_error"] for layer in out.metrics["layers"]))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    (
        (["solver=gptq", "solver.propagate=gptaq"], "solver.propagate=gptaq"),
        (["format.weight.granularity=tensor", "format.weight.group_size=null"], "spans rows"),
        (["solver.refit=maybe"], "solver.refit=maybe"),
        (["solver=minmax"], "of which it has none"),
        (["solver=adascale"], "of which it has none"),
    ),
)
def test_what_it_refuses(tmp_path, overrides, said):
    cfg, choices = small(tmp_path, "format=int4", "++solver.refit=true", *overrides)
    with pytest.raises(ConfigError, match=said):
        execute(cfg, choices)
