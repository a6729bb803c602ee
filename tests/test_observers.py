"""A group's range searched for by its error: never worse than its extremes, nor with zero points
that are no codes."""

from dataclasses import replace

import pytest
from number_formats import FORMATS, blocks_of, data, named

from harness.formats import MSE, Integer, error


@named("int4", "int4_asym", "fp4", "nvfp4", "mxfp4_even")
@pytest.mark.parametrize("shrink", ["range", "scale"])
def test_grid_search_never_loses_to_the_extremes(format, shrink):
    x = data(32, 128)
    rounded = {"mse_on_rounded_scale": True} if hasattr(format, "mse_on_rounded_scale") else {}
    searched = replace(format, observer="mse", mse={"shrink": shrink, "maxshrink": 0.8}, **rounded)
    e = error(blocks_of(format, x), blocks_of(format, searched.fake(x)), 2.4)
    e_minmax = error(blocks_of(format, x), blocks_of(format, format.fake(x)), 2.4)
    assert (e <= e_minmax * (1 + 1e-5)).all()
    assert e.sum() < e_minmax.sum()


def test_search_grids():
    assert MSE().factors[0] == 1
    assert len(MSE().factors) == 80
    assert MSE().factors[-1] == pytest.approx(0.21)
    assert len(MSE(shrink="scale").factors) == 100
    assert MSE(shrink="scale").factors[-1] == pytest.approx(0.208)
    expanded = MSE(maxshrink=0.555, grid=200, expand=1.8, patience=1000).factors
    assert len(expanded) == 111
    assert expanded[0] == 1.8


def test_patience_ends_the_search():
    x = data(16, 64)
    impatient = replace(FORMATS["int2_mse"], mse={"patience": 1})
    e, e_all = (error(x, format.fake(x), 2.4).sum() for format in (impatient, FORMATS["int2_mse"]))
    assert e >= e_all


@pytest.mark.parametrize("zp_range", ["signed", "unsigned"])
@pytest.mark.parametrize("shrink", ["range", "scale"])
def test_searched_zero_points_are_codes_too(shrink, zp_range):
    x = data(32, 64).abs()
    for side in (x, -x):
        format = Integer(
            granularity="group", group_size=32, symmetric=False, incl0="always", zp_range=zp_range
        )
        searched = replace(format, observer="mse", mse={"shrink": shrink})
        zero = searched.scales(side).zero
        assert zero.min() >= format.qmin and zero.max() <= format.qmax
        e, e_minmax = (error(side, own.fake(side), 2.4).sum() for own in (searched, format))
        assert e < e_minmax
