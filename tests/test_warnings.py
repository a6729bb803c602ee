"""What is doubtful is warned of in the result, what is sound is not, and a lost model comes with a
checklist."""

import math

import pytest
from transformed import ROTATED, run

WARNED = [
    ("identity", ["format=int4", "format.weight.group_size=32"], "outlier channels"),
    ("hadamard", ["solver=rtn"], "worse than identity"),
    ("hadamard", ["solver=rtn", "format.overrides={lm_head: mxfp8}"], "worse than identity"),
    ("identity", ["solver=minmax"], "this is rtn"),
    ("identity", ["solver=minmax", "format=int8", "format.weight.symmetric=false"], "this is rtn"),
    ("identity", ["solver=minmax", "format=int8", "format.weight.int_scale=aimet"], "this is rtn"),
    ("identity", ["solver.scales=dynamic", "format=int8"], "this is scales=static"),
    (
        "quarot",
        ["format=int8", "transform.r1=off", "transform.r2=false", "transform.r4=off"],
        "this is transform=identity",
    ),
    (
        "identity",
        ["solver=adascale", "solver.iterations=0"],
        "adascale changed nothing against minmax",
    ),
    ("identity", ["solver=faar", "solver.steps=0"], "signround changed nothing against rtn"),
    ("pca", ["format=int4", "format.weight.group_size=32"], "post_hadamard"),
    ("pca", ["format=mxfp4"], "MXFP4"),
    ("pca", ["format=mxfp8"], "with MXFP8"),
    *[(transform, [], "NVFP4") for transform in ROTATED],
    ("smoothquant", [], "NVFP4"),
    ("smoothquant", ["format=mxfp4"], "MX"),
    ("hadamard", ["transform.block_size=16", "format=mxfp4"], "smaller than the format's group"),
    ("wush", ["transform.block_size=16", "format=mxfp4"], "smaller than the format's group"),
]
SILENT = [
    ("identity", []),
    ("hadamard", ["solver=gptq"]),
    ("adacodec", []),
    ("quarot", ["format=mxfp4"]),
    ("pca", ["format=int4", "format.weight.group_size=32", "transform.post_hadamard=true"]),
    ("pca", []),
    ("wush", []),
    ("residual", []),
    ("flatquant", ["format=int4", "format.weight.group_size=32"]),
    ("block_affine", []),
    ("dct", []),
    ("quarot", ["format=int4", "format.weight.group_size=32", "format.kv.bits=4"]),
]


@pytest.mark.parametrize(("transform", "overrides", "words"), WARNED, ids=str)
def test_what_is_doubtful_is_warned_of(tmp_path, transform, overrides, words):
    warnings = run(tmp_path, transform, *overrides).metrics["warnings"]
    assert any(words in warning for warning in warnings), warnings


@pytest.mark.parametrize(("transform", "overrides"), SILENT, ids=str)
def test_what_is_sound_is_not(tmp_path, transform, overrides):
    assert run(tmp_path, transform, *overrides).metrics["warnings"] == []


@pytest.mark.parametrize(
    "options",
    [
        ["format=int8", "solver.scales=dynamic"],
        ["format=int8", "solver=minmax", "format.weight.symmetric=false"],
    ],
    ids=str,
)
def test_what_is_said_to_be_another_is(tmp_path, options):
    """The plain solver, on the same format, gives the same figures of every linear."""
    told, plain = (
        run(tmp_path, "identity", *options),
        ["solver=rtn"] if "solver=minmax" in options else [],
    )
    other = run(tmp_path, "identity", *[o for o in options if not o.startswith("solver")], *plain)
    assert other.metrics["run_id"] != told.metrics["run_id"]
    assert other.metrics["layers"] == told.metrics["layers"]


def test_a_lost_model_comes_with_a_checklist(tmp_path, capsys):
    from harness.report.table import run_table

    metrics = run(tmp_path, "identity").metrics
    del metrics["records"]  # as in a result of before there were any: the stages say all
    run_table(metrics, tmp_path)
    assert "norm weights" not in capsys.readouterr().out, "this model was never any good"
    metrics["stages"]["baseline"]["ppl"]["pydoc"] = 9.0
    run_table(metrics, tmp_path)
    assert "norm weights not fused" in capsys.readouterr().out
    assert math.isfinite(metrics["stages"]["quantized"]["ppl"]["pydoc"])
    for lost in (math.nan, math.inf, None):
        metrics["stages"]["quantized"]["ppl"]["pydoc"] = lost
        run_table(metrics, tmp_path)
        assert "norm weights not fused" in capsys.readouterr().out
