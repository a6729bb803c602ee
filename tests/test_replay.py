"""Runs sent to W&B afterwards, compared with what W&B was told while they ran; the workspace that
compares them."""

import json
import shutil
import subprocess
import sys

import pytest
from test_tracking import CONFIG, needs_wandb, play, records, without_login

from harness.store import Run, locked, write_json
from harness.tracking import Local, RunInfo, Several, Wandb, dashboard, replay

pytestmark = needs_wandb
VOLATILE = ("_timestamp", "runtime", "_wandb", "local_path", "artifact_path", "client_id")
STORED = {
    **CONFIG,
    "model": {**CONFIG["model"], "path": "somewhere"},
    "tracking": {"project": "mine", "tags": ["extra"]},
}
CHOICES = {"model": "tiny", "format": "int4", "export": None, "tracking": "local"}


def stored(run: Run, status: str = "done") -> Run:
    """What a run leaves beside `tracking/`."""
    run.path.mkdir(parents=True)
    run.start(STORED, {"quant_id": "q1"})
    run.set_status(status=status)
    return run


def told(run: Run) -> dict:
    """What the one offline run of the directory holds and that does not change from one time to the
    next, with its files."""
    found = records(run.path, run.path.name)
    kept = {
        kind: found.get(kind, []) for kind in ("metric", "history", "summary", "artifact", "exit")
    }
    keys = ("run_id", "display_name", "project", "run_group", "job_type", "tags", "config")
    kept["run"] = [{key: head.get(key) for key in keys} for head in found["run"]]
    (folder,) = run.path.glob("wandb/offline-run-*/files")
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*.*")
        if path.suffix != ".txt"
    }
    return {**_lasting(kept), "files": files}


def _lasting(value):
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if not key.endswith(VOLATILE)}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """(root, what W&B was told live, what by replay, the command's result): a run tracked live,
    killed and resumed, then sent again by the command; an older run, a broken one, and one that is
    running."""
    root = tmp_path_factory.mktemp("runs")
    run = stored(Run(root / "r1"))
    info = RunInfo("r1", "q1", run.path, group="bits", tags=("fast",), job_type="quantize")
    early = Local()
    early.start(CONFIG, info)
    early.log({"block/rel_error": 9.0}, 0)
    early.table("layers", [{"name": "stale"}])
    with (run.path / "tracking" / "curves.jsonl").open("a") as file:
        file.write('{"step": 1, "block/rel_')
    older = stored(Run(root / "r2"), "failed")
    older.save_metrics({"choices": CHOICES})
    write_json(older.path / "tracking" / "summary.json", {"status": "failed"})
    broken = stored(Run(root / "r0"), "interrupted")
    (broken.path / "config.yaml").write_text("model: [")
    busy = stored(Run(root / "r3"), "running")
    command = f"""
import sys
from harness.tracking.replay import main
print(main([{str(root)!r}]), "torch" in sys.modules)
"""
    with pytest.MonkeyPatch.context() as patch:
        without_login(patch, root.parent)
        play(Several([Local(), Wandb(project="mine", tags=["extra"])]), info, config=STORED)
        live = told(run)
        shutil.rmtree(run.path / "wandb")
        with locked(busy.path / "lock"):
            done = subprocess.run(
                [sys.executable, "-c", command], capture_output=True, text=True, timeout=120
            )
    return root, live, told(run), done


def test_a_replayed_run_is_the_run_that_was_tracked(sent):
    """Config, group, tags, job type, axes, points in their order, table, figures, page, summary and
    exit code."""
    _, live, again, _ = sent
    assert (
        len(live["history"]) == 46 and len(live["files"]) == 4 and live["artifact"] and live["exit"]
    )
    for kind in live:
        assert again[kind] == live[kind], kind


def test_families_keep_their_own_steps(sent):
    *_, again, _ = sent
    history = [record["item"] for record in again["history"]]
    for family, steps in {"train": list(range(40)), "block": [0, 1, 2]}.items():
        assert [item[f"{family}/index"] for item in history if f"{family}/index" in item] == steps


def test_no_secret_is_sent(sent):
    root, *_ = sent
    assert "hidden" in (root / "r1" / "config.yaml").read_text()
    files = [path for path in root.glob("*/wandb/**/*") if path.is_file()]
    assert files and not any(b"hidden" in path.read_bytes() for path in files)


def test_a_line_a_run_and_the_others_go_on(sent):
    *_, done = sent
    broken, good, older, busy, end = done.stdout.splitlines()
    assert broken.startswith("r0: NOT SENT (ParserError:") and "config.yaml" in broken
    assert good.startswith("r1: done, 44 points, 1 tables -> ") and "offline-run-" in good
    assert older.startswith("r2: failed, 0 points, 0 tables -> ")
    assert busy == "r3: skipped: still running"
    assert (end, done.stderr) == ("1 False", "")


def test_a_run_stored_before_there_was_run_json(sent):
    root, *_ = sent
    found = records(root / "r2", "r2")
    (head,) = found["run"]
    assert (head["project"], head.get("run_group"), head["tags"]) == (
        "mine",
        None,
        ["model:tiny", "format:int4", "extra"],
    )
    assert head["config"]["update"]["quant_id"] == "q1"
    assert [record["exit_code"] for record in found["exit"]] == [1]


def test_nothing_to_send(tmp_path, capsys):
    stored(Run(tmp_path / "r1"))
    assert replay.main([str(tmp_path), "--mode", "offline", "r7"]) == 2
    assert "r7" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of wandb-workspaces' own models
def test_the_dashboard_names_what_a_run_logs(tmp_path, capsys):
    """Of a run of the tiny model: its curves, its summary, its config."""
    pytest.importorskip("wandb_workspaces")
    from composed import small

    from harness.pipeline.job import execute

    cfg, choices = small(tmp_path)
    run = execute(cfg, choices, sweep="bits").run
    record = replay.Record.read(run)
    assert record.info.group == "bits"
    logged = (
        {key for _, values in record.curves for key in values}
        | {"block/index"}
        | set(record.summary)
    )
    assert dashboard.main(["--entity", "e", "--project", "p", "--corpora", "pydoc"]) == 0
    spec = json.loads(capsys.readouterr().out)["spec"]
    panels = {panel["viewType"]: [] for panel in _panels(spec)}
    for panel in _panels(spec):
        panels[panel["viewType"]].append(panel["config"])
    metrics = {key for panel in _panels(spec) for key in _metrics(panel["config"])}
    assert {key for key in metrics if not key.startswith("config:")} <= logged
    for key in metrics - logged:
        section, field = key.removeprefix("config:").split(".value.")
        assert field in record.config[section]
    assert set(panels) == {
        "Bar Chart",
        "Scatter Plot",
        "Parallel Coordinates Plot",
        "Run Comparer",
        "Run History Line Plot",
    }
    assert all(
        (plot["xAxis"], plot["groupBy"]) == ("block/index", "group")
        for plot in panels["Run History Line Plot"]
    )


def _panels(spec: dict) -> list[dict]:
    return [
        panel
        for section in spec["section"]["panelBankConfig"]["sections"]
        for panel in section["panels"]
    ]


def _metrics(config: dict) -> list[str]:
    named = [config.get("xAxis"), config.get("yAxis"), *config.get("metrics", [])]
    named += [column["accessor"] for column in config.get("columns", [])]
    return [key.removeprefix("summary:") for key in named if key]


def test_saving_the_dashboard_needs_a_login_and_the_package(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb_workspaces")
    without_login(monkeypatch, tmp_path)
    asked = ["--entity", "e", "--project", "p", "--save"]
    assert dashboard.main(asked) == 2
    error = capsys.readouterr().err
    assert "login" in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports", None)
    assert dashboard.main(asked) == 2
    error = capsys.readouterr().err
    assert "pip install wandb-workspaces" in error and error.count("\n") == 1
