"""Scripts of tests/examples run as they stand; a run called from Python is the command's."""

import runpy

import pytest
import torch
from composed import ROOT, SMALL

import harness
from harness.config.errors import ConfigError
from harness.evaluation.records import stored


def figures(outcome) -> dict:
    """{(corpus, metric): value} of the quantized model."""
    return {
        (one.source, one.metric): one.value
        for one in stored(outcome.metrics)
        if one.stage == "quantized"
    }


def test_the_first_hour(tmp_path, monkeypatch, capsys):
    """What is exported is what was measured, and what is loaded is what was exported."""
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(ROOT / "tests" / "examples" / "first_hour.py"))
    assert figures(names["exported"]) == figures(names["solved"]) != figures(names["nearest"])
    ours, _ = harness.load(names["folder"])
    ids = names["prompt"]["input_ids"]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, names["model"](ids).logits)
    shown = capsys.readouterr().out
    for name in ("nearest", "solved"):
        assert names[name].run.path.name[-10:] in shown
    assert "window losses, paired" in shown


def test_a_run_from_python_is_the_one_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [*SMALL, "run_root=~/runs", "solver=rtn", "eval.perplexity.corpora=[pydoc]"]
    first = harness.run(*words)
    again = harness.run(*words)
    assert first.status == again.status == "done"
    assert again.stored and not first.stored
    assert figures(first) == figures(again)
    assert first.run.path.parent == tmp_path / "runs", "~ is the home folder, as on a line"
    assert first.metrics["command"].endswith("'eval.perplexity.corpora=[pydoc]'")


@pytest.mark.parametrize(
    "words, said",
    [
        (["format=nvfp5"], ["nvfp5", "nvfp4"]),
        (["solver.damp=lots"], ["solver.damp=lots"]),
        (["sweeps=bits"], ["sweeps=bits", "-m"]),
    ],
)
def test_what_is_wrong_is_said_as_the_command_says_it(words, said):
    with pytest.raises(ConfigError) as caught:
        harness.run("model=tiny", *words)
    for word in said:
        assert word in str(caught.value)
