"""INT16 against its formula in float64; bits=16 goes on leaving a part float."""

import pytest
import torch
from composed import composed, small

from harness.config.build import build, settings
from harness.config.errors import ConfigError
from harness.formats import Format, Int16, Integer, QTensor
from harness.pipeline.job import execute


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_and_values_are_those_of_the_formula(symmetric):
    format = Int16(symmetric=symmetric, incl0="always", compute_dtype="input")
    x = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[1] += 3
    q = format.quantize(x)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        s = (x.abs().amax(-1, keepdim=True) / 32767).float().double()
        codes = (x / s).round().clamp(-32768, 32767)
        wanted = codes * s
    else:
        s = ((high - low) / 65535).float().double()
        z = (-low / s).round()
        codes = ((x / s).round() + z).clamp(0, 65535)
        wanted = (codes - z) * s
    assert torch.equal(q.codes.double(), codes)
    torch.testing.assert_close(q.dequantize(), wanted, rtol=0, atol=1e-12)
    assert torch.equal(format.fake(x), q.dequantize())
    again = QTensor.from_state(format, q.state(), x.shape, x.dtype)
    assert torch.equal(again.dequantize(), q.dequantize())
    assert codes.abs().max() > 2**14


@pytest.mark.parametrize("bits", [8, 15, 17])
def test_it_has_one_width(bits):
    with pytest.raises(ConfigError, match=f"bits={bits}"):
        Int16(bits=bits)
    with pytest.raises(ConfigError, match="bits=16"):
        Integer(bits=16)


def test_sixteen_bits_are_off_as_everywhere():
    act = settings(composed("format=int16")[0])["format"]["act"]
    assert isinstance(build(act, "format.act", Format), Int16)
    assert build(act | {"bits": 16}, "format.act", Format) is None
    with pytest.raises(ConfigError, match=r"format\.act\.bits=None"):
        build(act | {"_target_": "harness.formats.Integer"}, "format.act", Format)


@pytest.mark.parametrize(
    "options",
    [
        ["format=int16", "export=harness"],
        ["format=int16", "format.act.granularity=token", "format.act.range=dynamic"],
        ["format=int4", "format.weight.group_size=32", "format.overrides={decoder: {act: int16}}"],
    ],
    ids=str,
)
def test_runs(tmp_path, options):
    outcome = execute(
        *small(
            tmp_path,
            "solver=rtn",
            *options,
            f"export.path={tmp_path / 'out'}" if "export=harness" in options else "seed=0",
        )
    )
    assert outcome.status == "done", outcome.error
    stages = outcome.metrics["stages"]
    ratio = stages["quantized"]["ppl"]["pydoc"] / stages["baseline"]["ppl"]["pydoc"]
    assert abs(ratio - 1) < (1e-3 if "format=int16" in options else 0.3)
    assert ratio != 1
