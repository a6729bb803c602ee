"""A damaged record counts as absent: whatever was done to whichever file, the next run says so
once, computes it again, and ends with the figures of an undisturbed run."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from composed import ROOT, small

from harness.config.errors import ConfigError
from harness.pipeline.job import execute
from harness.store import Store

SETTINGS = (
    "transform=pca",
    "format=auto",
    "solver=rtn",
    "eval=zeroshot",
    "eval.zeroshot.tasks=[agreement]",
    "eval.zeroshot.limit=4",
)
KINDS = {
    # of tensors
    "tokens": "_shared/tokens/*.safetensors",
    "hidden states": "_shared/baselines/*.safetensors",
    "matrices": "_shared/placements/*.safetensors",
    "block": "tiny-*/blocks/0001.safetensors",
    "kept matrices": "kept.safetensors",
    # of JSON
    "baseline": "_shared/baselines/*.json",
    "answers": "_shared/baselines/*/agreement.json",
    "sensitivities": "_shared/sensitivities/*.json",
    "metrics": "tiny-*/metrics.json",
}


def flipped(content: bytes, where: int) -> bytes:
    return content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :]


DAMAGES = {
    "cut off": lambda content: content[: len(content) * 2 // 3],
    "a byte of its head": lambda content: flipped(content, 12),
    "a byte of its data": lambda content: flipped(content, len(content) * 3 // 4),
    "empty": lambda content: b"",
    "garbage": lambda content: bytes(range(256)) * 8,
    "another program's": lambda content: b'{"value": 1}\n',
}


# Each kind of record meets content that is another's, and one more damage, so that all but the last
# meet a record of tensors and one of JSON; all of both: test_store.py
OTHERS = ("cut off", "empty", "garbage", "another program's", "a byte of its head")
DAMAGED = [
    (kind, damage)
    for i, kind in enumerate(KINDS)
    for damage in ("a byte of its data", OTHERS[i % len(OTHERS)])
]


def run(text, root, *overrides):
    places = (f"run_root={root}", f"transform.save={root}/kept.safetensors")
    cfg, choices = small(text, *SETTINGS, *overrides, *places)
    return execute(cfg, choices)


def damages(outcome) -> list[str]:
    """The files that the run's events, of all its attempts, call damaged."""
    lines = (outcome.run.path / "events.jsonl").read_text().splitlines()
    return [event["file"] for event in map(json.loads, lines) if event["event"] == "damaged"]


def numbers(outcome):
    compared = ("stages", "layers", "bits_per_weight", "notes", "marks")
    return {key: outcome.metrics[key] for key in compared}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of the text, a store with one finished run, its outcome)."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = run(folder, folder / "runs")
    assert outcome.status == "done", outcome.error
    assert damages(outcome) == []
    return folder, folder / "runs", outcome


@pytest.mark.parametrize(("kind", "damage"), DAMAGED)
def test_a_damaged_record_is_said_once_and_made_again(tmp_path, whole, capsys, kind, damage):
    text, store, undisturbed = whole
    root = shutil.copytree(store, tmp_path / "runs")
    damaged = sorted(root.glob(KINDS[kind]))[0]
    before = damaged.read_bytes()
    damaged.write_bytes(DAMAGES[damage](before))
    if kind not in ("metrics", "kept matrices"):  # of a finished run these are read anyway
        (root / undisturbed.run.path.name / "status.json").unlink()
    outcome = run(text, root)
    assert outcome.status == "done", outcome.error
    assert not outcome.stored
    assert numbers(outcome) == numbers(undisturbed)
    assert damages(outcome) == [str(damaged)]
    assert capsys.readouterr().err.replace("\n", "").count(str(damaged)) == 1
    if kind not in ("baseline", "metrics"):  # which hold seconds
        assert damaged.read_bytes() == before
    assert run(text, root).stored


def test_an_adopted_block_is_checked_too(tmp_path, whole):
    """It is the other run's file, linked: that one stays as it is, this run has its own."""
    text, store, undisturbed = whole
    root = shutil.copytree(store, tmp_path / "runs")
    block = root / undisturbed.run.path.name / "blocks" / "0000.safetensors"
    content = block.read_bytes()
    block.write_bytes(DAMAGES["a byte of its data"](content))
    other = run(text, root, "eval.perplexity.windows=3")
    assert other.status == "done", other.error
    assert other.metrics["quant_id"] == undisturbed.metrics["quant_id"]
    assert other.metrics["layers"] == undisturbed.metrics["layers"]
    assert damages(other) == [str(other.run.block(0))]
    assert other.run.block(0).read_bytes() == content
    assert block.read_bytes() != content


def test_what_an_earlier_version_stored_is_still_shown(tmp_path, whole):
    """Its status holds no digests."""
    text, store, undisturbed = whole
    root = shutil.copytree(store, tmp_path / "runs")
    path = root / undisturbed.run.path.name / "status.json"
    status = json.loads(path.read_text())
    assert set(status.pop("digests")) == {"metrics.json", "outliers.json"}
    path.write_text(json.dumps(status))
    outcome = run(text, root)
    assert outcome.stored
    assert numbers(outcome) == numbers(undisturbed)


@pytest.mark.parametrize("name", ["status.json", "metrics.json"])
@pytest.mark.parametrize("content", ["[1]", "3", '"done"', "null", "{", ""])
def test_a_status_that_is_none_ends_nothing(tmp_path, whole, name, content):
    text, store, undisturbed = whole
    root = shutil.copytree(store, tmp_path / "runs")
    (root / undisturbed.run.path.name / name).write_text(content)
    outcome = run(text, root)
    assert outcome.status == "done", outcome.error
    assert not outcome.stored
    assert numbers(outcome) == numbers(undisturbed)


def test_a_stored_result_is_checked_without_torch(whole, tmp_path):
    text, store, _ = whole
    code = f"""
import sys
from pathlib import Path
from composed import small
from harness.pipeline.job import execute
places = ("run_root={store}", "transform.save={store}/kept.safetensors")
outcome = execute(*small(Path({str(text)!r}), *{SETTINGS!r}, *places))
print(outcome.stored, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}",
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_the_users_is_refused_before_anything_is_written(tmp_path, whole, damage):
    text, store, _ = whole
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(DAMAGES[damage]((store / "kept.safetensors").read_bytes()))
    with pytest.raises(ConfigError, match=f"transform.load={kept}"):
        run(text, tmp_path / "runs", f"transform.load={kept}")
    assert list(tmp_path.iterdir()) == [kept]


def test_the_report_leaves_out_what_is_damaged(tmp_path, whole, capsys):
    from harness.report import rows

    _, store, undisturbed = whole
    root = shutil.copytree(store, tmp_path / "runs")
    path = root / undisturbed.run.path.name
    (row,) = rows.rows(root)
    assert rows.samples(row, "agreement")
    assert rows.outliers(row)["rows"]
    for name in ("samples/quantized/agreement.json", "outliers.json", "metrics.json"):
        (path / name).write_bytes(DAMAGES["a byte of its data"]((path / name).read_bytes()))
    assert rows.samples(row, "agreement") is None
    assert rows.outliers(row) is None
    events = (path / "events.jsonl").read_bytes()
    assert [found["stages"] for found in rows.rows(root)] == [{}]
    assert str(path / "metrics.json") in capsys.readouterr().err
    assert (path / "events.jsonl").read_bytes() == events, "who only reads writes nothing"


def test_a_damaged_row_of_a_sweep_is_a_job_that_did_not_end(tmp_path):
    from harness.report.sweep import everyone, record
    from harness.store import write_record

    write_record(tmp_path / "sweep.json", {"overrides": [["seed=1"], ["seed=2"]]})
    for job in (0, 1):
        record(tmp_path, job, {"status": "done", "ppl": {"pydoc": 17.25}})
    path = tmp_path / "00001.json"
    path.write_text(path.read_text().replace("17.25", "17.24"))
    first, second = everyone(tmp_path)
    assert (first["status"], first["ppl"]) == ("done", {"pydoc": 17.25})
    assert second["status"] == "failed"


def test_a_store_says_it_to_its_reporter(tmp_path):
    said = []
    run = Store(tmp_path, said.append).run("a")
    run.block(0).parent.mkdir(parents=True)
    run.block(0).write_bytes(b"x" * 100)
    for _ in range(3):
        assert run.load_block(0) is None
    assert said == [f"{run.block(0)} is damaged (it holds no digest); it counts as absent"]
