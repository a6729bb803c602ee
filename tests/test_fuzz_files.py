"""Damaged files of others and of the store, drawn by a seed: every one ends in a finished run, or
in one readable line with nothing written."""

import json
import random
import shutil

import pytest
from composed import small

from harness.config.errors import ConfigError, DataError
from harness.models.tiny import Tiny
from harness.pipeline.job import execute

ODD = (
    None,
    "foo",
    "",
    -1,
    0,
    3.7,
    1e9,
    10**30,
    True,
    [],
    {},
    [1],
    {"a": 1},
    "float8",
    float("nan"),
)
CONFIGS, INDICES, TASKS = 36, 12, 20  # draws


def ends_well(tmp_path, *settings) -> str:
    """done, or the message of a refusal that left nothing."""
    root = tmp_path / "run"
    try:
        outcome = execute(*small(root, "solver=rtn", *settings))
    except (ConfigError, DataError) as error:
        assert str(error) and "\n" not in str(error), error
        assert not list(root.glob("runs/[!_]*")), "a refusal leaves no run"
        return str(error)
    finally:
        shutil.rmtree(root / "runs", ignore_errors=True)
    assert outcome.status == "done", outcome.error
    return "done"


def bytes_damaged(draw: random.Random, content: bytes) -> bytes:
    """Cut, a byte changed, a piece doubled, or something else altogether."""
    place = draw.randrange(len(content))
    return draw.choice(
        (
            content[:place],
            content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :],
            content[:place] + content[place : place + 9] + content[place:],
            draw.choice((b"", b"\0" * 100, b"[]", b"null", b'"text"', b"[" * 5000, b"\xff\xfe{}")),
        )
    )


def json_damaged(draw: random.Random, value: dict) -> bytes:
    """One key gone or given an odd value, at any depth; or its bytes damaged."""
    if draw.random() < 0.3:
        return bytes_damaged(draw, json.dumps(value).encode())
    copy = inner = json.loads(json.dumps(value))
    key = draw.choice(list(inner))
    while isinstance(inner[key], dict) and inner[key] and draw.random() < 0.5:
        inner = inner[key]
        key = draw.choice(list(inner))
    if draw.random() < 0.25:
        del inner[key]
    else:
        inner[key] = draw.choice(ODD)
    return json.dumps(copy).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    model, tokenizer = Tiny(family="qwen3").load()
    model.save_pretrained(folder, max_shard_size="600KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "draws"), [("config.json", CONFIGS), ("model.safetensors.index.json", INDICES)]
)
def test_a_damaged_folder(folder, tmp_path, name, draws):
    path, draw = folder / name, random.Random(name)
    whole = path.read_bytes()
    ends = []
    try:
        for _ in range(draws):
            path.write_bytes(json_damaged(draw, json.loads(whole)))
            ends.append(ends_well(tmp_path, "model=hf", f"model.path={folder}"))
    finally:
        path.write_bytes(whole)
    assert any(end != "done" for end in ends)
    assert all(str(folder) in end for end in ends if end != "done"), "a refusal names the folder"


def test_damaged_task_files(tmp_path):
    rows = [{"query": f"one {i}", "choices": [" a", " b"], "gold": i % 2} for i in range(3)]
    whole = "\n".join(map(json.dumps, rows)).encode()
    tasks, draw = tmp_path / "tasks", random.Random("tasks")
    tasks.mkdir()
    ends = []
    for _ in range(TASKS):
        row = draw.randrange(3)
        damaged = [json.dumps(each).encode() for each in rows]
        damaged[row] = json_damaged(draw, rows[row])
        (tasks / "mine.jsonl").write_bytes(
            draw.choice((b"\n".join(damaged), bytes_damaged(draw, whole)))
        )
        zeroshot = [
            "eval=zeroshot",
            "eval.zeroshot.tasks=[mine]",
            f"eval.zeroshot.data_path={tasks}",
        ]
        ends.append(ends_well(tmp_path, *zeroshot))
    assert any(end != "done" for end in ends)
