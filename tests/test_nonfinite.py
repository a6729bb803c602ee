"""NaN and infinity: refused in weights, kept visible in activations."""

from dataclasses import replace

import pytest
import torch
from number_formats import blocks_of, data, named

from harness.config.errors import DataError
from harness.formats import NVFP4


def fitting(format, role):
    names = {"weight": ("token", "channel"), "activation": ("channel", "token")}[role]
    knobs = {"granularity": names[1]} if format.granularity == names[0] else {}
    return {**knobs, "scope": "tensor"} if isinstance(format, NVFP4) and role == "weight" else knobs


@named()
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_must_be_finite(format, bad):
    x = data(4, 64)
    x[1, 3] = bad
    with pytest.raises(DataError, match="1 of 256"):
        replace(format, role="weight", **fitting(format, "weight")).quantize(x)


@named()
def test_nan_activations_stay_visible(format):
    if format.granularity == "block":
        pytest.skip("squares are of weights")
    format = replace(format, role="activation", **fitting(format, "activation"))
    x = data(4, 64)
    x[1, 3] = torch.nan
    dq = format.fake(x)
    everything = format.granularity == "tensor" or getattr(format, "scope", "token") == "tensor"
    if getattr(format, "global_scale", "") in ("fixed", "none"):
        everything = False
    if getattr(format, "range", "") == "unit":
        assert torch.equal(dq.isnan(), x.isnan())
    elif everything:
        assert dq.isnan().all()
    elif getattr(format, "scope", "") == "token":
        assert torch.equal(
            dq.isnan(), torch.tensor([False, True, False, False])[:, None].expand(4, 64)
        )
    else:
        own = blocks_of(format, torch.zeros(4, 64)).clone()
        own[1, 0] = 1
        assert torch.equal(dq.isnan(), own.flatten(-2).bool())


@named("nvfp4", "mxfp4", "int4", "fp4")
def test_infinite_activations_are_not_hidden(format):
    x = data(4, 64)
    x[1, 3] = torch.inf
    dq = replace(format, role="activation", **fitting(format, "activation")).fake(x)
    assert not dq[1, :16].isfinite().all()
