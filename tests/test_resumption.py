"""What a run finds of earlier ones: results and blocks are taken again, what was interrupted or
damaged ends with the same bits, and one process at a time writes."""

import json
import os
import shutil
import threading

import pytest
from composed import run, small

from harness.config.build import settings
from harness.config.errors import DataError
from harness.pipeline.job import Attempt, execute
from harness.pipeline.plan import make_plan
from harness.quantize.block_state import BlockState
from harness.store import RunLocked, files, locked


def numbers(metrics):
    return metrics["stages"], metrics["layers"], metrics["bits_per_weight"]


def test_stored_result_is_shown_and_force_computes_again(tmp_path):
    first = run(tmp_path)
    again = run(tmp_path)
    assert again.stored
    assert again.metrics == json.loads((first.run.path / "metrics.json").read_text())
    forced = run(tmp_path, "force=true")
    assert not forced.stored
    assert numbers(forced.metrics) == numbers(first.metrics)


def test_baseline_is_computed_once(tmp_path):
    run(tmp_path, "solver=rtn")
    shared = list((tmp_path / "runs" / "_shared" / "baselines").glob("*.json"))
    assert len(shared) == 1
    before = shared[0].stat().st_mtime_ns
    other = run(tmp_path, "solver=gptq")
    assert shared[0].stat().st_mtime_ns == before
    assert other.metrics["stages"]["baseline"]["tokens"] == 256


def test_other_evaluation_reuses_the_blocks(tmp_path):
    first = run(tmp_path)
    other = run(tmp_path, "eval.perplexity.windows=3")
    assert first.metrics["quant_id"] == other.metrics["quant_id"]
    assert first.metrics["run_id"] != other.metrics["run_id"]
    assert other.metrics["layers"] == first.metrics["layers"]
    events = [
        json.loads(line)["event"]
        for line in (other.run.path / "events.jsonl").read_text().splitlines()
    ]
    assert "block" not in events


@pytest.mark.parametrize("sequencing", ["sites", "block"])
@pytest.mark.parametrize("format", ["nvfp4", "int4", "mxfp4"])
def test_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, format, sequencing):
    settings = [f"format={format}", "transform=hadamard", f"solver.sequencing={sequencing}"]
    whole = run(tmp_path / "a", *settings)

    class Killed(Exception):
        pass

    settle, calls = BlockState.settle, []

    def dies_in_the_second_block(self, *args):
        calls.append(self.index)
        if len(calls) == 7:
            raise Killed
        return settle(self, *args)

    monkeypatch.setattr(BlockState, "settle", dies_in_the_second_block)
    assert run(tmp_path / "b", *settings).status == "failed"
    monkeypatch.undo()
    resumed = run(tmp_path / "b", *settings)
    assert not resumed.stored
    assert numbers(resumed.metrics) == numbers(whole.metrics)
    shutil.rmtree(tmp_path)


def test_force_computes_again_beside_a_sibling(tmp_path):
    """Another run with the same quantized model must not lend its blocks to a forced one."""
    run(tmp_path)
    run(tmp_path, "eval.perplexity.windows=3")
    forced = run(tmp_path, "force=true")
    events = [
        json.loads(line) for line in (forced.run.path / "events.jsonl").read_text().splitlines()
    ]
    assert [e["index"] for e in events if e["event"] == "block"] == [0, 1]


def test_damaged_block_is_solved_again(tmp_path):
    whole = run(tmp_path)
    block = whole.run.block(1)
    block.write_bytes(block.read_bytes()[:1000])
    os.remove(whole.run.path / "status.json")
    again = run(tmp_path)
    assert again.status == "done"
    assert numbers(again.metrics) == numbers(whole.metrics)


def test_who_waits_for_a_run_that_is_refused_keeps_it_to_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    waits, holds, over = (threading.Event() for _ in range(3))
    cfg, choices = small(tmp_path)
    lock = tmp_path / "runs" / make_plan(settings(cfg), choices).run_id / "lock"

    def waiter():
        with locked(lock, wait=True, say=lambda _: waits.set()):
            (lock.parent / "status.json").write_text("mine")
            holds.set()
            over.wait(5)

    thread = threading.Thread(target=waiter)

    def refused(self):
        thread.start()
        assert waits.wait(5)
        raise DataError("no good")

    monkeypatch.setattr(Attempt, "_compute", refused)
    with pytest.raises(DataError, match="no good"):
        execute(cfg, choices)
    try:
        assert holds.wait(5)
        with pytest.raises(RunLocked), locked(lock):
            pass
        assert [path.name for path in lock.parent.parent.iterdir()] == [lock.parent.name]
        assert (lock.parent / "status.json").read_text() == "mine"
    finally:
        over.set()
        thread.join(5)


def test_two_writers(tmp_path):
    cfg, choices = small(tmp_path)
    done = execute(cfg, choices)
    os.remove(done.run.path / "status.json")
    with locked(done.run.path / "lock"), pytest.raises(RunLocked, match="another process"):
        execute(cfg, choices)
