import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from harness.config.build import build
from harness.config.errors import ConfigError
from harness.tracking import Local, RunInfo, Several, Tracker, Wandb
from harness.tracking.base import without_secrets

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")

CONFIG = {
    "model": {
        "name": "smol",
        "path": Path("somewhere"),
        "tokenizer": "smol",
        "hf_token": "hf_hidden",
    },
    "format": {"overrides": {"embed_tokens": {"bits": 16}}},
    "max_tokens": 4096,
    "keys": [{"api_key": "hidden", "apiKey": "hidden", "kept": 1}, "text"],
    "login": {
        "password": "hidden",
        "client_secret": "hidden",
        "WANDB_API_KEY": "hidden",
        "access-token": "hidden",
    },
}
KEPT = {
    "model": {"name": "smol", "path": Path("somewhere"), "tokenizer": "smol"},
    "format": {"overrides": {"embed_tokens": {"bits": 16}}},
    "max_tokens": 4096,
    "keys": [{"kept": 1}, "text"],
    "login": {},
}


@pytest.fixture
def run(tmp_path) -> RunInfo:
    return RunInfo(
        run_id="r1",
        quant_id="q1",
        directory=tmp_path / "r1",
        group="bits",
        tags=("fast",),
        job_type="quantize",
    )


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    return without_login(monkeypatch, tmp_path)


def without_login(monkeypatch, home: Path):
    """W&B with no login and none of its variables set."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(home / "no-netrc"))
    monkeypatch.setenv("HOME", str(home))
    return monkeypatch


def play(tracker: Tracker, run: RunInfo, status: str = "done", config: dict = CONFIG) -> None:
    tracker.start(config, run)
    for step in range(40):
        tracker.log({"train/loss": 1.0 / (step + 1)}, step)
    for block in range(3):
        points = {
            "block/rel_error": torch.tensor(0.5 * block),
            "block/sqnr_db": 20.0 - block,
            "block/attn/sqnr": 30.0 + block,
        }
        tracker.log(points, block)
    tracker.log({"seconds": 2.5}, 7)
    tracker.table(
        "layers",
        [
            {"name": "q_proj", "error": 0.1},
            {"name": "k_proj", "damping": None},
            {"name": 3, "error": 1},
        ],
    )
    page = run.directory / "report.html"
    page.parent.mkdir(exist_ok=True)
    page.write_text("<p>r1</p>")
    tracker.page(page)
    tracker.finish({"ppl": {"wikitext": 5.25}, "path": Path("here")}, status)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(directory: Path, run_id: str = "r1") -> dict[str, list[dict]]:
    """What the .wandb file of the one offline run holds, by the inspector that W&B ships; contents
    keyed by record type."""
    (path,) = directory.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    by_type: dict[str, list[dict]] = {}
    for record in map(json.loads, output.splitlines()):
        by_type.setdefault(record["type"], []).append(record[record["type"]])
    return by_type


def test_secrets_are_dropped_at_every_depth():
    assert without_secrets(CONFIG) == KEPT


def test_local_files(run):
    play(Local(), run)
    directory = run.directory / "tracking"
    assert sorted(path.name for path in directory.iterdir()) == [
        "curves.jsonl",
        "layers.jsonl",
        "run.json",
        "summary.json",
    ]
    who = {
        "run_id": "r1",
        "quant_id": "q1",
        "group": "bits",
        "tags": ["fast"],
        "job_type": "quantize",
    }
    assert json.loads((directory / "run.json").read_text()) == who
    curves = lines(directory / "curves.jsonl")
    assert len(curves) == 44
    assert curves[0] == {"step": 0, "train/loss": 1.0}
    assert curves[42] == {
        "step": 2,
        "block/rel_error": 1.0,
        "block/sqnr_db": 18.0,
        "block/attn/sqnr": 32.0,
    }
    assert lines(directory / "layers.jsonl")[1] == {"name": "k_proj", "damping": None}
    summary = json.loads((directory / "summary.json").read_text())
    assert summary == {"status": "done", "ppl": {"wikitext": 5.25}, "path": "here"}


def test_local_goes_on_after_a_kill_in_the_middle_of_a_line(run):
    first = Local()
    first.start({}, run)
    first.log({"block/error": 1.0}, 0)
    curves = run.directory / "tracking" / "curves.jsonl"
    with curves.open("a") as file:
        file.write('{"step": 1, "block/err')
    resumed = Local()
    resumed.start({}, run)
    resumed.log({"block/error": 2.0}, 1)
    assert lines(curves) == [{"step": 0, "block/error": 1.0}, {"step": 1, "block/error": 2.0}]


def test_local_replaces_tables_and_keeps_its_curves(run):
    local = Local()
    local.start({}, run)
    local.table("eval/zeroshot", [{"task": "a"}, {"task": "b"}])
    local.table("eval/zeroshot", [{"task": "c"}])
    assert lines(run.directory / "tracking" / "eval_zeroshot.jsonl") == [{"task": "c"}]
    with pytest.raises(ValueError, match="curves"):
        local.table("curves", [])


class Broken(Tracker):
    """Fails in one call; counts what it was asked before and after."""

    def __init__(self, broken_call: str):
        self.broken_call, self.calls = broken_call, []

    def _reached(self, call):
        self.calls.append(call)
        if call == self.broken_call:
            raise OSError("the server is gone")

    def start(self, config, run):
        self._reached("start")

    def log(self, values, step):
        self._reached("log")

    def table(self, name, rows):
        self._reached("table")

    def page(self, path):
        self._reached("page")

    def finish(self, summary, status="done"):
        self._reached("finish")


@pytest.mark.parametrize("call", ["start", "log", "table", "page", "finish"])
def test_a_failing_tracker_is_left_out_and_the_others_go_on(run, call):
    warnings, broken = [], Broken(call)
    play(Several([broken, Local()], warn=warnings.append), run)
    assert len(warnings) == 1
    assert "Broken" in warnings[0] and call in warnings[0] and "the server is gone" in warnings[0]
    assert broken.calls[-1] == call and broken.calls.count(call) == 1
    directory = run.directory / "tracking"
    assert len(lines(directory / "curves.jsonl")) == 44
    assert len(lines(directory / "layers.jsonl")) == 3
    assert json.loads((directory / "summary.json").read_text())["status"] == "done"


def test_an_interrupt_is_no_failure_of_a_tracker(run):
    class Interrupted(Tracker):
        def log(self, values, step):
            raise KeyboardInterrupt

    several = Several([Interrupted()])
    with pytest.raises(KeyboardInterrupt):
        several.log({}, 0)


@needs_wandb
def test_wandb_offline_run_read_back(run, nowhere, capfd):
    """Without a login the run goes offline by itself, silently, and its file holds everything."""
    warnings = []
    play(Wandb(tags=["extra"], warn=warnings.append), run, status="failed")
    assert not warnings
    assert capfd.readouterr() == ("", "")
    found = records(run.directory)

    (head,) = found["run"]
    assert (head["run_id"], head["display_name"], head["project"]) == ("r1", "r1", "low-bit")
    assert (head["run_group"], head["job_type"], head["tags"]) == (
        "bits",
        "quantize",
        ["fast", "extra"],
    )
    assert head["resume"] is True
    config = {key: value for key, value in head["config"]["update"].items() if key != "_wandb"}
    assert config == {**KEPT, "model": {**KEPT["model"], "path": "somewhere"}, "quant_id": "q1"}

    axes = {
        metric["glob_name"]: metric["step_metric"]
        for metric in found["metric"]
        if "glob_name" in metric
    }
    assert axes == {"block/*": "block/index", "train/*": "train/index"}

    history = [record["item"] for record in found["history"]]
    keys = ("block/index", "block/rel_error", "block/sqnr_db", "block/attn/sqnr")
    blocks = [tuple(item[key] for key in keys) for item in history if "block/index" in item]
    assert blocks == [(0, 0.0, 20, 30), (1, 0.5, 19, 31), (2, 1.0, 18, 32)]
    assert [item["train/index"] for item in history if "train/loss" in item] == list(range(40))
    assert [item["index"] for item in history if "seconds" in item] == [7]

    (table,) = run.directory.glob("wandb/offline-run-*/files/media/table/layers_*.table.json")
    assert json.loads(table.read_text())["columns"] == ["name", "error", "damping"]
    assert json.loads(table.read_text())["data"] == [
        ["q_proj", 0.1, None],
        ["k_proj", None, None],
        [3, 1, None],
    ]

    drawn = {item: history[-1][f"figures/{item}.path"] for item in ("rel_error", "sqnr_db")}
    for item, values in {"rel_error": [0.0, 0.5, 1.0], "sqnr_db": [20.0, 19.0, 18.0]}.items():
        (figure,) = run.directory.glob(f"wandb/offline-run-*/files/{drawn[item]}")
        (curve,) = json.loads(figure.read_text())["data"]
        assert (curve["type"], curve["x"], curve["y"]) == ("scatter", [0, 1, 2], values)

    (artifact,) = [artifact for artifact in found["artifact"] if artifact["type"] == "report"]
    (entry,) = artifact["manifest"]["contents"]
    assert (artifact["name"], entry["path"]) == ("r1", "report.html")
    assert Path(entry["local_path"]).read_text() == "<p>r1</p>"
    assert Path(entry["local_path"]).is_relative_to(run.directory / "wandb")

    summary = {}
    for record in found["summary"]:
        summary.update(record.get("update", {}))
    assert summary["ppl"] == {"wikitext": 5.25}
    assert summary["status"] == "failed"
    assert [record["exit_code"] for record in found["exit"]] == [1]

    text = b"".join(path.read_bytes() for path in run.directory.rglob("*") if path.is_file())
    assert b"hidden" not in text


@needs_wandb
def test_a_setting_wins_over_the_environment_and_null_leaves_it(run, nowhere, tmp_path):
    for name in ("PROJECT", "ENTITY", "NAME"):
        nowhere.setenv(f"WANDB_{name}", f"env-{name.lower()}")
    nowhere.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    nowhere.setenv("WANDB_MODE", "offline")
    (tmp_path / "elsewhere").mkdir()
    for tracker in (Wandb(), Wandb(project="mine", entity="me", name="this", mode="offline")):
        tracker.start(
            {}, RunInfo(run_id=f"r-{tracker._project}", quant_id="q", directory=run.directory)
        )
        tracker.finish({})
    (left,) = records(tmp_path / "elsewhere", "r-None")["run"]
    (won,) = records(tmp_path / "elsewhere", "r-mine")["run"]
    assert (left["project"], left["entity"], left["display_name"]) == (
        "env-project",
        "env-entity",
        "env-name",
    )
    assert (won["project"], won["entity"], won["display_name"]) == ("mine", "me", "this")


@needs_wandb
def test_online_without_a_login_is_offline_and_says_so(run, nowhere):
    warnings = []
    play(Wandb(mode="online", warn=warnings.append), run)
    assert len(warnings) == 1 and "login" in warnings[0]
    assert records(run.directory)["exit"]


@needs_wandb
def test_an_unreachable_server_leaves_an_offline_run(run, nowhere):
    """In a process of its own: W&B reads where its server is once per process."""
    nowhere.setenv("WANDB_API_KEY", "0123456789" * 4)
    nowhere.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    nowhere.setenv("WANDB_INIT_TIMEOUT", "1")
    program = f"""
import pathlib
from harness.tracking import RunInfo, Wandb
warnings = []
tracker = Wandb(warn=warnings.append)
directory = pathlib.Path({str(run.directory)!r})
tracker.start({{}}, RunInfo(run_id="r1", quant_id="q1", directory=directory))
tracker.log({{"block/error": 0.25}}, 5)
tracker.finish({{}})
print(len(warnings), "offline" in warnings[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 True\n", "")
    found = records(run.directory)
    assert [
        (record["item"]["block/index"], record["item"]["block/error"])
        for record in found["history"]
    ] == [(5, 0.25)]
    assert found["exit"]


def test_settings_that_cannot_work():
    target = {"_target_": "harness.tracking.Trackers"}
    for settings, told in (
        ({"mode": "ofline"}, r"mode='ofline'.*offline"),
        ({"wandb": "maybe"}, "wandb=maybe: needs true"),
        ({"tags": "a"}, "tags=a: needs a list, each a word"),
        ({"name": 5}, "name=5: needs a word or null"),
    ):
        with pytest.raises(ConfigError, match=rf"tracking\.{told}"):
            build(target | settings, "tracking", Tracker)


def test_both_configurations_have_the_same_fields():
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        mirror, local = (compose(f"tracking/{name}").tracking for name in ("wandb", "local"))
    assert mirror == {**local, "wandb": True} and local.wandb is False
    assert {"entity", "project", "name"} <= set(mirror)
