"""Files of others are data: wherever a mapping may stand in them, one that names a thing to build
is planted, and nothing is imported, called, written or read outside of the folder."""

import json
import shutil
import sys
from contextlib import suppress

import pytest
from composed import small
from preserved import tiny_shape
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import snapshots  # noqa: F401  a fixture

import harness
from harness.checkpoints.folder import digests
from harness.checkpoints.source import CheckpointModel
from harness.config.build import option
from harness.config.errors import ConfigError, DataError
from harness.formats import Scheme
from harness.pipeline.job import execute
from harness.pipeline.transforms import transforms_of
from harness.report.__main__ import main as report
from harness.transforms import file

TARGETS = {  # of this package, of the standard library, of a file beside the checkpoint
    "own function": lambda witness: {
        "_target_": "harness.report.page.write_page",
        "root": "/",
        "path": str(witness),
    },
    "own class": lambda witness: {"_target_": "harness.store.Store", "root": str(witness)},
    "own format": lambda witness: {"_target_": "harness.formats.NVFP4"},
    "imported name": lambda witness: {
        "_target_": "harness.store.write",
        "path": str(witness),
        "content": "x",
    },
    "library": lambda witness: {"_target_": "os.mkdir", "path": str(witness)},
    "beside": lambda witness: {"_target_": "planted.touch", "path": str(witness)},
}


def places(value, path=()):
    """Every place of nested containers, but those that only name things."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:2])
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*path, key))


def planted(value, path, content):
    if not path:
        return content
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = planted(copy[path[0]], path[1:], content)
    return copy


@pytest.fixture
def folder(snapshots, tmp_path, monkeypatch):  # noqa: F811
    """A checkpoint with matrices, activation formats and a cache; a module lies beside it, on the
    path."""
    _, whole = snapshots("rotations")
    folder = tmp_path / "checkpoint"
    shutil.copytree(whole, folder)
    (folder / "planted.py").write_text(
        "import pathlib\n\ndef touch(path):\n    pathlib.Path(path).touch()\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    return folder


def seal(folder) -> None:
    (folder / "digests.json").write_text(json.dumps(digests(folder)))


def attempt(act, witness) -> None:
    """The act ends as it likes, but by no other error than ours, and leaves nothing."""
    before = set(witness.parent.rglob("*"))
    with suppress(DataError, ConfigError):
        act()
    assert "planted" not in sys.modules
    assert set(witness.parent.rglob("*")) == before


@pytest.mark.parametrize("target", TARGETS)
def test_the_record_of_a_checkpoint(folder, tmp_path, target):
    path, witness = folder / "harness.json", tmp_path / "witness" / "file"
    witness.parent.mkdir()
    record = json.loads(path.read_text())
    for place in places(record):
        path.write_text(json.dumps(planted(record, place, TARGETS[target](witness))))
        seal(folder)
        attempt(lambda: harness.load(folder), witness)
        attempt(CheckpointModel(path=str(folder)).check, witness)


@pytest.mark.parametrize("target", TARGETS)
def test_the_matrices_of_a_checkpoint(folder, tmp_path, target):
    path, witness = folder / "placement.safetensors", tmp_path / "witness" / "file"
    witness.parent.mkdir()
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        specs = json.loads(file.metadata()["placements"])
    for place in places(specs):
        save_file(
            tensors,
            path,
            metadata={"placements": json.dumps(planted(specs, place, TARGETS[target](witness)))},
        )
        seal(folder)
        attempt(lambda: harness.load(folder), witness)


@pytest.mark.parametrize("target", TARGETS)
def test_a_placement_file_of_a_run(tmp_path, target):
    saved, witness = tmp_path / "matrices.safetensors", tmp_path / "witness" / "file"
    witness.parent.mkdir()
    learning = ["transform=jointquant", "transform.r1.epochs=1", "eval.perplexity.windows=1"]
    assert execute(*small(tmp_path, *learning, f"transform.save={saved}")).status == "done"
    tensors = load_file(saved)
    with safe_open(saved, "pt") as opened:
        spec = json.loads(opened.metadata()["placement"])
    transform, facts = transforms_of(option("transform", "jointquant"))[0], spec["facts"]
    context = tiny_shape(Scheme())
    for place in places(spec):
        save_file(
            tensors,
            saved,
            metadata={"placement": json.dumps(planted(spec, place, TARGETS[target](witness)))},
        )
        attempt(lambda: file.check(str(saved), transform, context, facts), witness)
        attempt(lambda: file.load(saved, transform, context), witness)


@pytest.mark.parametrize("target", TARGETS)
def test_the_metadata_of_a_checkpoint(folder, tmp_path, target):
    path, witness = folder / "quantization_metadata.json", tmp_path / "witness" / "file"
    witness.parent.mkdir()
    about = {
        "run_id": "x",
        "method": {"transform": "quarot", "solver": "rtn"},
        "bits": {"weights": {"format": "nvfp4"}},
        "marks": {},
        "layers": [{"name": "a"}],
        "formats": {"nvfp4": 1},
    }
    for place in places(about):
        path.write_text(json.dumps(planted(about, place, TARGETS[target](witness))))
        seal(folder)
        settings = [
            "model=checkpoint",
            f"model.path={folder}",
            "format=none",
            "transform=identity",
            "solver=none",
        ]
        outcome = execute(
            *small(tmp_path / "measured", *settings, "force=true", "eval.perplexity.windows=1")
        )
        assert outcome.status == "done", outcome.error
        assert not any(witness.parent.iterdir())
        assert "planted" not in sys.modules


@pytest.mark.parametrize("target", TARGETS)
def test_the_records_of_a_run(tmp_path, target, capsys):
    outcome = execute(*small(tmp_path))
    witness = tmp_path / "witness" / "file"
    witness.parent.mkdir()
    for name in ("metrics.json", "status.json"):
        path = outcome.run.path / name
        whole = path.read_text()
        record = json.loads(whole)
        for place in places(record):
            path.write_text(json.dumps(planted(record, place, TARGETS[target](witness))))
            for command in ("ls", "show", "page"):
                words = [outcome.run.path.name] if command == "show" else []
                report([command, str(tmp_path / "runs"), *words])
            assert not any(witness.parent.iterdir())
            assert "planted" not in sys.modules
        path.write_text(whole)
