"""A new evaluation is one file and one option, and is shown wherever metrics are; records of runs
that have none follow from their stages."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from composed import ROOT, SMALL, small
from test_tracking import needs_wandb, records

from harness.config.build import settings
from harness.config.errors import ConfigError
from harness.evaluation.base import Display, Evaluation, Metric
from harness.evaluation.records import described, plain, stored, summary
from harness.evaluation.shipped import Perplexity, evaluations, fingerprints
from harness.pipeline.plan import make_plan
from harness.report.figures import figures

CODE = '''
from dataclasses import dataclass

from harness.evaluation.base import Display, Evaluation


class Sum:
    def __init__(self, windows):
        self.windows, self.total, self.count = windows, 0.0, 0

    def __call__(self, window, position, states, logits):
        if window < self.windows:
            logs = logits.log_softmax(-1)
            self.total -= float((logs.exp() * logs).sum())
            self.count += len(logits)


@dataclass(frozen=True)
class Entropy(Evaluation):
    """Entropy of the next-token distribution, in nats."""

    windows: int = 1
    displays = {"nats": Display("entropy", digits=2, lower_is_better=True)}

    def watch(self, subject, corpus):
        return Sum(self.windows)

    def measure(self, subject):
        return {
            corpus: {"nats": watch.total / watch.count, "odd": 0.5, "odd_stderr": 0.25}
            for corpus, watch in subject.watches.items()
        }
'''
OPTION = """
defaults:
  - perplexity
  - _self_
name: entropy
evaluations: {entropy: {_target_: harness.evaluation.entropy.Entropy, windows: 2}}
"""


@needs_wandb
def test_a_new_evaluation_is_a_file_and_an_option(tmp_path):
    for name in ("harness", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "run.py", tmp_path)
    (tmp_path / "harness" / "evaluation" / "entropy.py").write_text(CODE)
    (tmp_path / "conf" / "eval" / "entropy.yaml").write_text(OPTION)
    for file in ("train.txt", "test.txt"):
        (tmp_path / file).write_text(f"{file} says nothing new. " * 200)
    inherited = ("WANDB", "COLUMNS")  # another test's service, a terminal's width
    environment = {key: x for key, x in os.environ.items() if not key.startswith(inherited)}
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment |= {"WANDB_MODE": "offline", "PYTHONPATH": path}

    def python(*words):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    line = [word for word in SMALL if not word.startswith("tracking")]
    line += ["tracking=wandb", "data=text", f"data.path={tmp_path}", "data.name=own"]
    line += ["solver=rtn", "format=int4", "eval=entropy", "eval.perplexity.corpora=[data]"]
    line += ["export=harness", f"export.path={tmp_path / 'out'}"]
    table = python("run.py", *line)
    (path,) = (tmp_path / "runs").glob("tiny-*")
    metrics = json.loads((path / "metrics.json").read_text())
    values = {one["stage"]: one for one in metrics["records"] if one["metric"] == "nats"}
    assert list(values) == ["baseline", "quantized"]
    assert values["quantized"]["evaluation"] == "entropy"
    assert 0 < values["quantized"]["value"] < 6
    shown = f"{values['quantized']['value']:.2f}"
    lines = table.splitlines()
    head = next(index for index, line in enumerate(lines) if "odd" in line)
    rows = lines[head + 2 : head + 4]
    assert "entropy" in lines[head]
    assert f" {shown} " in rows[1] and "0.5000 ± 0.2500" in rows[1]

    listed = python("-m", "harness.report", "ls", "--sort", "entropy")
    assert shown in listed and "0.5000 ± 0.2500" in listed
    python("-m", "harness.report", "page")
    page = (tmp_path / "runs" / "report.html").read_text("utf-8")
    assert '"evaluation":"entropy","source":"own","title":"entropy"' in page
    card = next((tmp_path / "out").rglob("README.md")).read_text()
    assert "| entropy, own |" in card and shown in card

    told = {}
    for record in records(path, path.name)["summary"]:
        told |= record.get("update", {})
    entropy = {key: value for key, value in told.items() if key.startswith("entropy/")}
    assert entropy["entropy/quantized/own/nats"] == values["quantized"]["value"]
    assert entropy["entropy/baseline/own/odd_stderr"] == 0.25
    assert {"ppl/quantized/own", "divergence/quantized/own/kl"} <= told.keys()


STAGES = {
    "baseline": {"ppl": {"a": 9.0}, "tokens": 8, "losses": {"a": [2.1]}},
    "quantized": {
        "ppl": {"a": None},
        "divergence": {"a": {"kl": 0.25, "top1": 0.5}},
        "zeroshot": {"t": {"acc": 0.5, "acc_stderr": 0.1, "n": 40}},
    },
}


def test_what_was_stored_before_there_were_records_gives_the_same():
    metrics = {"stages": STAGES}
    found = stored(metrics)
    assert found[0] == Metric("ppl", "baseline", "a", "ppl", 9.0)
    assert found[1].value != found[1].value  # null stands for what was not finite
    assert found[2:] == [
        Metric("divergence", "quantized", "a", "kl", 0.25),
        Metric("divergence", "quantized", "a", "top1", 0.5),
        Metric("zeroshot", "quantized", "t", "acc", 0.5, stderr=0.1, n=40),
    ]
    chosen = evaluations({"zeroshot": {"tasks": ["agreement"]}, "evaluations": {}})
    again = json.loads(json.dumps(plain(chosen, STAGES)))
    assert set(again) == {"records"}
    assert repr(stored(again | metrics)) == repr(found)
    assert summary(found[2:]) == {
        "divergence/quantized/a/kl": 0.25,
        "divergence/quantized/a/top1": 0.5,
        "zeroshot/quantized/t/acc": 0.5,
        "zeroshot/quantized/t/acc_stderr": 0.1,
        "zeroshot/quantized/t/n": 40,
    }


def test_a_metric_nobody_has_described_is_shown_all_the_same():
    record = {
        "evaluation": "gone",
        "stage": "quantized",
        "source": "a",
        "metric": "depth",
        "value": 3.0,
        "stderr": None,
        "n": None,
    }
    metrics = {"records": [record], "stages": {}, "displays": {}}
    (figure,) = figures(metrics)["quantized"].values()
    assert (figure.label, figure.named) == ("depth", "3.0000")
    assert "gone" not in described(metrics)


def test_a_run_without_further_evaluations_keeps_its_id(tmp_path):
    cfg, choices = small(tmp_path, "format=int4")
    plan = make_plan(settings(cfg), choices)
    assert fingerprints(plan.evaluations) == []
    cfg, choices = small(tmp_path, "eval=zeroshot")
    (mark,) = fingerprints(make_plan(settings(cfg), choices).evaluations)
    assert mark == [{"agreement": None}, None, None, None]


class Counted(Evaluation):
    """Measures nothing, under two settings."""

    displays = {"n": Display("n")}

    def __init__(self, times: int):
        self.times = times

    def measure(self, subject):
        return {}


def test_an_evaluation_that_is_added_has_a_part_in_the_id():
    ones = [{"ppl": Perplexity(), name: Counted(n)} for name, n in (("x", 1), ("x", 2), ("y", 1))]
    marks = [fingerprints(one) for one in ones]
    assert all(len(mark) == 1 for mark in marks)
    assert len({json.dumps(mark) for mark in marks}) == 3


@pytest.mark.parametrize("name", ["ppl", "losses", "zeroshot", "a/b"])
def test_a_name_that_is_taken_is_refused(name):
    node = {"_target_": "harness.evaluation.shipped.Perplexity"}
    with pytest.raises(ConfigError, match=f"evaluations.{name}"):
        evaluations({"zeroshot": None, "evaluations": {name: node}})
