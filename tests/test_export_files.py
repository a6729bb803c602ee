"""Files of exports: who may read them, lost and half-replaced ones made good, and nothing
half-written or wrong left behind."""

import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
from exported import RIGHT, left, run

import harness
from harness.models.source import assert_finite


@pytest.mark.parametrize("layout", RIGHT)
def test_the_umask_decides_who_may_read(tmp_path, layout):
    before = os.umask(0o027)
    try:
        outcome = run(
            tmp_path,
            f"export={layout}",
            "transform=pca" if layout == "harness" else "transform=identity",
            *([f"transform.save={tmp_path / 'kept.safetensors'}"] if layout == "harness" else []),
        )
    finally:
        os.umask(before)
    assert outcome.status == "done", outcome.error
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "text" not in path.parts]
    assert sum(path.suffix == ".safetensors" for path in written) >= 4
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in written} == {
        path.name: "0o640" for path in written
    }


def test_a_lost_checkpoint_is_written_again_without_solving(tmp_path):
    first = run(tmp_path, "export=harness")
    assert run(tmp_path, "export=harness").stored
    shutil.rmtree(first.metrics["export"]["path"])
    again = run(tmp_path, "export=harness")
    assert not again.stored
    assert Path(again.metrics["export"]["path"]).is_dir()
    events = [
        json.loads(line)["event"]
        for line in (again.run.path / "events.jsonl").read_text().splitlines()
    ]
    assert events.count("block") == 2
    model, _ = harness.load(first.metrics["export"]["path"])
    assert_finite(model)


def test_what_a_killed_replacement_left_is_mended(tmp_path):
    first = Path(run(tmp_path, "export=harness").metrics["export"]["path"])
    first.rename(first.with_name(f".{first.name}.old"))
    again = run(tmp_path, "export=harness")
    assert again.metrics["export"]["path"] == str(first)
    assert left(tmp_path) == [first.name]


def test_another_run_never_replaces_a_checkpoint(tmp_path):
    for seed in (0, 1):
        assert run(tmp_path, "export=harness", "transform=quarot", f"seed={seed}").status == "done"
    names = left(tmp_path)
    assert len(names) == 2
    runs = [
        json.loads((tmp_path / "out" / name / "quantization_metadata.json").read_text())["seed"]
        for name in names
    ]
    assert sorted(runs) == [0, 1]


@pytest.fixture
def full_disk():
    """A switch: once on, no file can grow beyond 300 kB, which the run's own records do not
    need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda on: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000 if on else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("layout", RIGHT)
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, layout, full_disk):
    assert (
        run(
            tmp_path,
            *(["format.act.compute_dtype=input"] if layout == "compressed_tensors" else []),
        ).status
        == "done"
    )
    full_disk(True)
    outcome = run(tmp_path, f"export={layout}")
    full_disk(False)
    assert outcome.status == "failed"
    assert re.search(
        f"export.path={tmp_path}/out: .*[Ff]ile too large.*nothing was left", outcome.error
    )
    assert left(tmp_path) == []
    assert run(tmp_path, f"export={layout}").status == "done"
    assert len(left(tmp_path)) == 1


def test_what_does_not_come_back_is_no_checkpoint(tmp_path, monkeypatch):
    """A layout that loses the last bit of a scale is caught by the gate, and an older checkpoint of
    that name stays."""
    from harness.checkpoints.compressed_tensors import CompressedTensors

    good = run(tmp_path, "export=compressed_tensors")
    weights = Path(good.metrics["export"]["path"]) / "model.safetensors"
    before = weights.read_bytes()
    plain = CompressedTensors.tensors

    def wrong(self, snapshot):
        for name, tensor in plain(self, snapshot):
            if name.endswith("layers.1.mlp.up_proj.weight_packed"):
                tensor = tensor.clone()
                tensor[0, 0] ^= 1
            yield name, tensor

    monkeypatch.setattr(CompressedTensors, "tensors", wrong)
    outcome = run(tmp_path, "export=compressed_tensors", "force=true")
    assert outcome.status == "failed"
    assert "model.layers.1.mlp.up_proj does not come back" in outcome.error
    assert len(left(tmp_path)) == 1
    assert weights.read_bytes() == before
