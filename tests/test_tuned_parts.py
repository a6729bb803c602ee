"""What was tuned is a run of its own on the blocks of the run without: found again, learned again
where it is damaged, and the same bits after a kill."""

import pytest
from composed import small
from events import events
from tuners import LEARNERS, run

from harness.config.build import settings
from harness.config.errors import ConfigError
from harness.pipeline import ids
from harness.pipeline.plan import make_plan
from harness.report.settings import apart
from harness.tune.distill import Moving


def tuned(outcome):
    """{file: its bytes} of what a tuner left."""
    return {
        path.name: path.read_bytes()
        for path in outcome.run.path.glob("blocks/[0-9]*.*.safetensors")
    }


def test_windows_of_its_own_leave_what_is_solved(tmp_path):
    options = ["tune=scales", "solver=gptq", "data.calibration.order=random"]
    own = run(tmp_path, *options, "tune.windows=3")
    shared = run(tmp_path, *options)
    assert own.run.path != shared.run.path
    assert events(own, "block") and not events(shared, "block")
    with pytest.raises(ConfigError, match=r"tune\.windows=3"):
        run(tmp_path, *options, "tune.windows=3", "data.calibration.windows=null")


def test_without_a_tuner_nothing_is_another_run(tmp_path, monkeypatch):
    def plan(*overrides):
        cfg, choices = small(tmp_path, *overrides)
        return make_plan(settings(cfg), choices)

    none, scales, weights = (plan(f"tune={name}") for name in ("none", "scales", "weights"))
    shorter = plan("tune=scales", "tune.steps=7")
    plans = (none, scales, weights, shorter)
    assert len({p.quant_id for p in plans}) == len({p.baseline_id for p in plans}) == 1
    assert len({p.run_id for p in plans}) == len({p.tune_id for p in plans}) == 4
    assert none.tune_id == ""
    monkeypatch.setattr(ids, "of_tune", lambda section: [])  # as before there was the setting
    assert plan("tune=none").run_id == none.run_id


def test_what_was_tuned_is_found_and_what_was_solved_is_kept(tmp_path):
    plain = run(tmp_path)
    first = run(tmp_path, "tune=scales")
    assert events(first, "block") == [], "the blocks are those of the run without"
    again = run(tmp_path, "tune=scales", "eval.perplexity.windows=3")
    other = run(tmp_path, "tune=scales", "tune.steps=3")
    assert [events(o, "tune")[0]["source"] for o in (first, again, other)] == [
        "tuned",
        "store",
        "tuned",
    ]
    assert tuned(again) == tuned(first)
    for outcome in (first, again, other):
        for index in range(2):
            mine, theirs = outcome.run.block(index), plain.run.block(index)
            assert mine.read_bytes() == theirs.read_bytes()
    assert run(tmp_path, "tune=scales").stored
    forced = run(tmp_path, "tune=scales", "force=true")
    assert events(forced, "tune")[-1]["source"] == "tuned"
    assert forced.metrics["stages"] == first.metrics["stages"]


def test_a_damaged_part_is_tuned_again(tmp_path):
    whole = run(tmp_path, "tune=scales")
    wanted = tuned(whole)
    path = next(whole.run.path.glob("blocks/0001.*.safetensors"))
    path.write_bytes(path.read_bytes()[:1000])
    (whole.run.path / "status.json").unlink()
    again = run(tmp_path, "tune=scales")
    assert again.metrics["stages"] == whole.metrics["stages"]
    assert tuned(again) == wanted


@pytest.mark.parametrize("options", LEARNERS[2::2], ids=str)
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch, options):
    options = [*options, "tune.steps=16"]
    whole = run(tmp_path / "whole", *options)
    steps = []
    step = Moving.step

    def killed(self):
        steps.append(self.taken)
        if len(steps) == 8:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Moving, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", *options)
    again = run(tmp_path / "killed", *options)
    assert steps[8:] == list(range(6, 16)), "from the last held-out loss"
    assert tuned(again) == tuned(whole)
    assert again.metrics["stages"] == whole.metrics["stages"]
    assert again.metrics["notes"] == whole.metrics["notes"]
    assert list(again.run.path.glob("blocks/tune.*")) == []


def test_a_tuned_run_is_told_apart():
    """From runs of before there was the choice, too, which are those without a tuner."""
    choices = [{"solver": "rtn"}, {"solver": "rtn", "tune": "none"}]
    rows = [{"choices": each} for each in (*choices, {"solver": "rtn", "tune": "scales"})]
    assert apart(rows, [{"seed": "0"}] * 3) == ["", "", "tune=scales"]
