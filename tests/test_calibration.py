"""The text that calibrates: not the one that is evaluated, as many windows as it has, none where
nothing needs one."""

import json

import pytest
from composed import run, small

from harness.calibration.windows import tokenize
from harness.config.errors import ConfigError, DataError
from harness.models.tiny import Tiny
from harness.pipeline.job import execute


@pytest.mark.parametrize(
    "unread",
    [
        "data.calibration.windows=200000",
        "data.calibration.length=8192",
        "data.calibration.path=nowhere.txt",
    ],
)
def test_calibration_settings_are_no_matter_where_nothing_calibrates(tmp_path, unread):
    plain, other = (
        run(tmp_path / name, "format=none", "solver=none", *own)
        for name, own in (("a", []), ("b", [unread]))
    )
    assert other.status == "done", other.error
    assert other.metrics["stages"] == plain.metrics["stages"]
    assert other.metrics["run_id"] == plain.metrics["run_id"]


def test_calibrating_on_the_evaluated_text_is_refused(tmp_path):
    (tmp_path / "test.txt").write_text("evaluated " * 500)
    (tmp_path / "train.txt").write_text("calibrates " * 500)
    cfg, choices = small(
        tmp_path,
        "data=text",
        f"data.path={tmp_path}",
        f"data.calibration.path={tmp_path / 'test.txt'}",
    )
    with pytest.raises(ConfigError, match=r"data\.calibration\.path"):
        execute(cfg, choices)


SHORT = [f"Sample {n}: the quick brown fox is {n} years old." for n in range(8)]


@pytest.mark.parametrize(
    "options",
    [
        ["transform=pca"],
        ["solver=awq"],
        ["solver=adascale", "solver.iterations=2"],
        ["transform=spinquant", "transform.steps=1", "format.act.scope=tensor"],
    ],
    ids=str,
)
def test_a_few_short_samples_calibrate(tmp_path, options):
    """windows=null: a window of its own length, where the samples together do not fill one."""
    path = tmp_path / "seed.jsonl"
    own = [
        f"data.calibration.path={path}",
        "data.calibration.length=2048",
        "data.calibration.windows=null",
    ]

    def calibrated(samples, *more):
        path.write_text("\n".join(json.dumps({"text": sample}) for sample in samples))
        outcome = run(tmp_path, *options, *own, *more)
        assert outcome.status == "done", outcome.error
        return outcome.metrics

    first, packed = calibrated(SHORT), tokenize(Tiny().load()[1], SHORT)
    assert first["notes"]["calibration"] == f"1 x {len(packed)} tokens"
    cut = calibrated(SHORT, "data.calibration.length=64")
    assert cut["notes"]["calibration"] == f"{len(packed) // 64} x 64 tokens"
    other = calibrated([*SHORT, "One more."])
    assert len({run["quant_id"] for run in (first, cut, other)}) == 3


def test_as_many_windows_as_there_are_is_the_same_as_their_number(tmp_path):
    path = tmp_path / "seed.jsonl"
    path.write_text("\n".join(json.dumps({"text": sample}) for sample in SHORT))
    count = len(tokenize(Tiny().load()[1], SHORT)) // 64
    named, null = (
        run(tmp_path, f"data.calibration.path={path}", f"data.calibration.windows={n}").metrics
        for n in (count, "null")
    )
    assert null["stages"] == named["stages"]
    assert null["layers"] == named["layers"]
    assert "calibration" not in named["notes"]


def test_a_text_of_one_token_calibrates_nothing(tmp_path):
    (tmp_path / "own.txt").write_text("a")
    own = [f"data.calibration.path={tmp_path / 'own.txt'}", "data.calibration.windows=null"]
    with pytest.raises(
        DataError, match=r"data\.calibration\.length=2 tokens need 2 tokens, the text has only 1"
    ):
        run(tmp_path, *own)
    assert not any((tmp_path / "runs").glob("tiny*"))
