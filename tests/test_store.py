"""The store's files: digests against every flipped byte, full disks, locks that say who holds them,
what a killed process leaves, and what is known of the machine."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import packages_distributions, version

import pytest
import torch
from composed import ROOT, small
from safetensors.torch import load_file

from harness.pipeline.job import execute
from harness.store import (
    Run,
    RunLocked,
    Store,
    checked,
    environment,
    files,
    intact,
    load_tensors,
    locked,
    provenance,
    read_record,
    save_tensors,
    write_checked,
    write_json,
    write_record,
)
from harness.store.provenance import PACKAGES
from harness.store.tensors import DTYPES

VALUE = {"rows": [{"name": "q_proj", "errors": {"int4": 0.1, "ü": 1e-300}}], "seconds": 1.5}
ASIDE = {"rich", "plotly", "wandb-workspaces", "PyYAML"}  # no number passes through them


def tensors() -> dict:
    """One of every dtype, one without dimensions, one without elements, one that is a view."""
    kept = {name: torch.arange(-4, 4).to(getattr(torch, name)) for name in DTYPES}
    view = torch.arange(24.0).view(4, 6).mT[1:]
    return kept | {"scalar": torch.tensor(7.25), "none": torch.zeros(0, 3), "view": view}


@pytest.fixture
def gone() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def octets(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def child(code: str) -> subprocess.Popen:
    line = [sys.executable, "-c", code]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def told(reader, *arguments) -> tuple:
    """(what a reader returns, what it said of damage)."""
    said = []
    return reader(*arguments, lambda path, why: said.append(path)), said


@pytest.mark.parametrize("mask", [1, 32])
def test_a_record_notices_every_flipped_byte(tmp_path, mask):
    path = tmp_path / "a.json"
    write_record(path, VALUE)
    assert told(read_record, path) == (VALUE, [])
    assert json.loads(path.read_text()).items() >= VALUE.items(), "other tools can read it"
    content = path.read_bytes()
    for where in range(len(content)):
        path.write_bytes(content[:where] + bytes([content[where] ^ mask]) + content[where + 1 :])
        assert told(read_record, path) == (None, [path]), where
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert told(read_record, path) == (None, [path]), length
    path.unlink()
    assert told(read_record, path) == (None, [])


@pytest.mark.parametrize("mask", [1, 32])
def test_tensors_notice_every_flipped_byte(tmp_path, mask):
    path = tmp_path / "a.safetensors"
    codes = torch.arange(40, dtype=torch.uint8)
    save_tensors(path, {"codes": codes, "scale": torch.tensor(0.5)}, {"report": "{}"})
    assert told(intact, path) == ({"report": "{}"}, [])
    content = path.read_bytes()
    for where in range(len(content)):
        path.write_bytes(content[:where] + bytes([content[where] ^ mask]) + content[where + 1 :])
        assert told(load_tensors, path) == (None, [path]), where
    cut = (b"", content[:9], content[:-1], content[8:])
    for changed in (*cut, content + b"\0", b"\xff" * 8 + content[8:]):
        path.write_bytes(changed)
        assert told(load_tensors, path) == (None, [path])
    path.unlink()
    assert told(load_tensors, path) == (None, [])


def test_plain_json_is_checked_by_a_digest_kept_elsewhere(tmp_path):
    path = tmp_path / "a.json"
    digest = write_checked(path, [VALUE])
    assert json.loads(path.read_text()) == [VALUE]
    assert told(checked, path, digest) == ([VALUE], [])
    path.write_text(path.read_text().replace("1.5", "1.4"))
    assert told(checked, path, digest) == (None, [path])
    assert told(checked, path, None) == ([VALUE | {"seconds": 1.4}], [])
    path.write_text("{")
    assert told(checked, path, None) == (None, [path])


def test_tensors_come_back_in_every_bit_and_safetensors_reads_them(tmp_path):
    path, kept = tmp_path / "deep" / "a.safetensors", tensors()
    save_tensors(path, kept, {"b": "1", "a": "ü"})
    found, metadata = load_tensors(path)
    assert metadata == {"b": "1", "a": "ü"}
    for read in (found, load_file(path)):
        assert read.keys() == kept.keys()
        for name, tensor in kept.items():
            assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(octets(read[name]), octets(tensor))
    assert found["float64"].data_ptr() % 64 == 0, "as torch's own memory is"
    content = path.read_bytes()
    save_tensors(path, dict(reversed(kept.items())), {"b": "1", "a": "ü"})
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_the_umask_decides_who_reads(tmp_path):
    save_tensors(tmp_path / "a", {"a": torch.ones(1)})
    write_record(tmp_path / "b", VALUE)
    (tmp_path / "c").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def writes(path):
    """Everything that replaces or appends to a file, on `path`."""
    return {
        "text": lambda: files.write(path, "x"),
        "json": lambda: write_json(path, VALUE),
        "record": lambda: write_record(path, VALUE),
        "checked": lambda: write_checked(path, VALUE),
        "tensors": lambda: save_tensors(path, {"a": torch.ones(100_000)}),
    }


@pytest.mark.parametrize("kind", writes(None))
def test_a_full_disk_is_named(tmp_path, kind):
    path = tmp_path / "a"
    path.write_text("old")
    path.with_name(f".a.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device; free some space") as raised:
        writes(path)[kind]()
    assert raised.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_by_what_appends_and_locks(tmp_path, monkeypatch):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="free some space") as raised:
        Run(tmp_path).event("start")
    assert raised.value.filename == str(tmp_path / "events.jsonl")
    write = os.write
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(os, "write", lambda file, text: write(full.fileno(), text))
        with pytest.raises(OSError, match="free some space") as raised, locked(tmp_path / "lock"):
            pass
    assert raised.value.filename == str(tmp_path / "lock")


def test_other_errors_name_the_file_too(tmp_path):
    (tmp_path / "a").write_text("no folder")
    with pytest.raises(OSError) as raised:
        write_json(tmp_path / "a" / "b.json", VALUE)
    assert raised.value.filename == str(tmp_path / "a" / "b.json")


def test_a_run_on_a_full_disk_says_where(tmp_path):
    cfg, choices = small(tmp_path, "solver=rtn")
    done = execute(cfg, choices)
    (done.run.path / "status.json").unlink()
    (done.run.path / f".metrics.json.{os.getpid()}").symlink_to("/dev/full")
    outcome = execute(cfg, choices)
    assert outcome.status == "failed"
    assert "No space left on device; free some space" in outcome.error
    assert str(done.run.path / "metrics.json") in outcome.error
    assert execute(cfg, choices).metrics["stages"] == done.metrics["stages"]


@pytest.fixture
def patience(monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.2)


def waited(path, seconds: float) -> list[str]:
    """What is said by who waits for a lock that is let go of after so long."""
    said, taken, left = [], threading.Event(), []

    def hold():
        with locked(path):
            taken.set()
            time.sleep(seconds)
            left.append(path)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    with pytest.raises(RunLocked, match=rf"pid {os.getpid()} on .* since 20"), locked(path):
        pass
    with locked(path, wait=True, say=said.append):
        assert left == [path], "never two at once"
    thread.join()
    return said


def test_who_waits_long_is_told_once_for_whom(tmp_path, patience):
    assert waited(tmp_path / "lock", 0.02) == []
    (message,) = waited(tmp_path / "lock", 0.6)
    assert re.search(rf"pid {os.getpid()} on \S+ since 20\d\d-\d\d-\d\dT", message)
    assert str(tmp_path / "lock") in message


def test_who_waited_for_a_lock_that_is_gone_holds_the_new_one(tmp_path, monkeypatch):
    """The folder is taken away, with the lock in it, by who holds that."""
    monkeypatch.setattr(files, "PATIENCE", 0)
    path = tmp_path / "run" / "lock"
    waits, holds, over = (threading.Event() for _ in range(3))

    def waiter():
        with locked(path, wait=True, say=lambda _: waits.set()):
            holds.set()
            over.wait(5)

    thread = threading.Thread(target=waiter)
    with locked(path):
        thread.start()
        assert waits.wait(5)
        files.aside(path.parent, tmp_path)
        assert not path.parent.exists() and list(Store(tmp_path).runs()) == []
    try:
        assert holds.wait(5)
        with pytest.raises(RunLocked, match=f"pid {os.getpid()}"), locked(path):
            pass
    finally:
        over.set()
        thread.join(5)


def test_a_stage_that_another_process_makes_is_waited_for_aloud(tmp_path, patience):
    said = []
    store = Store(tmp_path, said.append)
    path = store.shared("baselines", "abc")
    code = f"""
import time
from harness.store import Store
store = Store({str(tmp_path)!r})
with store.holding(store.shared("baselines", "abc")):
    print("held", flush=True)
    time.sleep(1)
"""
    with child(code) as other:
        assert other.stdout.readline() == "held\n"
        with store.holding(path):
            pass
    assert len(said) == 1
    assert f"pid {other.pid} on " in said[0]
    assert "baselines/abc.lock" in said[0]


def test_what_a_killed_writer_left_is_gone_at_the_next_start(tmp_path):
    run = Run(tmp_path / "run")
    run.path.mkdir()
    for name in ("metrics.json", "blocks/0", "samples/quantized/a.json", "tracking/b"):
        code = f"""
import time
from pathlib import Path
from harness.store import replacing
with replacing(Path({str(run.path / name)!r})) as path:
    path.write_text("half")
    print("half", flush=True)
    time.sleep(60)
"""
        with child(code) as writer:
            assert writer.stdout.readline() == "half\n"
            writer.send_signal(signal.SIGKILL)
        assert (run.path / name).with_name(f".{(run.path / name).name}.{writer.pid}").is_file()
    alive, other = run.path / f".metrics.json.{os.getpid()}", run.path / ".keep"
    alive.touch()
    other.touch()
    with open(run.path / "events.jsonl", "w") as file:
        file.write('{"event": "start"}\n{"event": "sta')
    run.start({}, {})
    assert sorted(path for path in run.path.rglob(".*")) == sorted([alive, other])
    lines = (run.path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["start", "start"]


def test_what_a_killed_writer_left_of_a_shared_record_is_gone_at_its_next_use(tmp_path, gone):
    store = Store(tmp_path)
    path = store.shared("baselines", "abc")
    names = (f".abc.json.{gone}", f".abc.safetensors.{gone}", f"abc/.sums.json.{gone}")
    dead = [path.parent / name for name in names]
    names = (f".abc.json.{os.getpid()}", f".other.json.{gone}", "abc.json")
    kept = [path.parent / name for name in names]
    for leftover in dead + kept:
        leftover.parent.mkdir(parents=True, exist_ok=True)
        leftover.touch()
    with store.holding(path):
        assert [leftover.exists() for leftover in dead + kept] == [False] * 3 + [True] * 3


def test_the_environment_knows_the_harness_and_every_library_that_computes(tmp_path):
    found = environment()
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", found["harness"])
    assert (found["commit"] is not None) == (ROOT / ".git").exists()
    assert found["packages"]["torch"] == version("torch")
    imported = set()
    for path in (ROOT / "harness").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    known = packages_distributions()
    needed = {name.replace("_", "-") for module in imported for name in known.get(module, [])}
    assert needed - ASIDE - {"harness"} <= set(PACKAGES)
    cfg, choices = small(tmp_path, "solver=rtn")
    known = json.loads((execute(cfg, choices).run.path / "environment.json").read_text())
    assert {key: known[key] for key in found} == json.loads(json.dumps(found))
    assert known["compute"]["threads"] == torch.get_num_threads()
    assert known["compute"]["device"].partition(":")[0] in ("cpu", "cuda")


def test_a_source_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() is None
    (tmp_path / ".git").mkdir()
    assert provenance.commit() is None, "git refuses it"
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "a").write_text("1")
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["add", "a"], [*who, "commit", "-qm", "a"], ["tag", "v1"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    clean = provenance.commit()
    head = subprocess.check_output(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], text=True)
    assert clean == head.strip()
    (tmp_path / "a").write_text("2")
    assert provenance.commit() == f"{clean}-dirty"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "harness"\nversion = "7.1"\n')
    assert provenance.version() == "7.1"
