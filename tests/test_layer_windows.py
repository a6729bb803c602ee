"""Errors of layers are measured on a few windows where solving reads no text, and on all where it
does."""

import pytest
from composed import small

from harness.config.errors import ConfigError
from harness.pipeline import solving
from harness.pipeline.job import execute
from harness.quantize import blocks

DYNAMIC = ["format=nvfp4", "format.act.scope=token"]


def streamed(tmp_path, monkeypatch, *settings) -> tuple[int, dict]:
    """(calibration windows that passed through the blocks, metrics)."""
    seen, quantize = [], blocks.quantize

    def counting(adapter, scheme, solver, windows, *args, **kwargs):
        seen.append(len(windows))
        return quantize(adapter, scheme, solver, windows, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(solving.blocks, "quantize", counting)
        outcome = execute(*small(tmp_path, *settings))
    assert outcome.status == "done", outcome.error
    return seen[0], outcome.metrics


def test_a_solver_that_reads_no_text_streams_a_few_windows_and_gives_the_same_weights(
    tmp_path, monkeypatch
):
    few, some = streamed(tmp_path / "few", monkeypatch, *DYNAMIC, "solver=rtn")
    all_, every = streamed(
        tmp_path / "all", monkeypatch, *DYNAMIC, "solver=rtn", "eval.layer_windows=null"
    )
    assert (few, all_) == (4, 6)
    assert some["stages"] == every["stages"], "no figure of the model depends on it"
    errors = [[layer["rel_error"] for layer in metrics["layers"]] for metrics in (some, every)]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)
    assert some["quant_id"] != every["quant_id"], "what is told of its layers does"


@pytest.mark.parametrize(
    "settings",
    [
        ["format=nvfp4", "solver=rtn"],
        [*DYNAMIC, "solver=gptq"],
        ["format=int4", "solver=awq"],
        ["format=int4", "solver=adascale", "solver.iterations=1"],
    ],
    ids=" ".join,
)
def test_who_reads_the_text_reads_all_of_it(tmp_path, monkeypatch, settings):
    assert streamed(tmp_path, monkeypatch, *settings)[0] == 6


@pytest.mark.parametrize("value", ["0", "many", "2.5"])
def test_the_number_is_checked(tmp_path, value):
    with pytest.raises(ConfigError, match=rf"eval\.layer_windows={value}"):
        execute(*small(tmp_path, f"eval.layer_windows={value}"))
