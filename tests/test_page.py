"""What the report page embeds of runs, finished or damaged, and that it needs nothing else."""

import json
import re

import pytest
from page_runs import BITS, HOSTILE, MARKS, embedded, put, settings, store_run, sweep

from harness.report.page import write_page


def test_figures_are_embedded_and_what_runs_share_is_stored_once(tmp_path):
    ids = [store_run(tmp_path / "runs", index) for index in range(12)]
    page = write_page(tmp_path / "runs", tmp_path / "out" / "page.html")
    assert page == tmp_path / "out" / "page.html" and [
        path.name for path in page.parent.iterdir()
    ] == ["page.html"]
    data = embedded(page)
    assert [run["id"] for run in data["runs"]] == ids[::-1]  # newest first
    run, stored = (
        data["runs"][-1],
        json.loads((tmp_path / "runs" / ids[0] / "metrics.json").read_text()),
    )
    final = stored["stages"]["quantized"]
    place = {(one["source"], one["title"]): str(i) for i, one in enumerate(data["columns"])}
    assert list(place) == [
        ("wikitext-2", "ppl"),
        ("wikitext-2", "KL"),
        ("wikitext-2", "top-1"),
        ("pydoc", "ppl"),
        ("arc_easy", "arc_easy"),
    ]
    ppl = place["pydoc", "ppl"]
    assert run["figures"][ppl][0] == pytest.approx(final["ppl"]["pydoc"], rel=1e-5)
    assert run["baseline"][ppl] == 14.12
    value, *known = run["figures"][place["arc_easy", "arc_easy"]]
    assert known == [0.035, 200, "acc_norm"]
    assert value == pytest.approx(final["zeroshot"]["arc_easy"]["acc_norm"], rel=1e-3)
    assert run["figures"][place["wikitext-2", "KL"]][0] == pytest.approx(
        final["divergence"]["wikitext-2"]["kl"], rel=1e-3
    )
    assert [data["marks"][i] for i in run["marks"]["wikitext-2"]] == [
        list(mark) for mark in zip("cs", MARKS["wikitext-2"])
    ]
    steps, errors = run["curves"]["block/rel_error"]
    assert steps == list(range(30)) and all(error == float(f"{error:.4g}") for error in errors)
    attention = run["activations"]["sites"]["attn_in"]
    assert attention["worst"]["before"] == {"max_over_median": [329, 29], "kurtosis": [88, 0]}
    assert {run["activations"]["sites"]["attn_in"]["before"] for run in data["runs"]} == {
        attention["before"]
    }
    assert "not embedded" not in page.read_text("utf-8")
    for run in data["runs"]:  # base and differences give every setting back
        held = settings(data, run)
        assert held["format.name"] == run["format"] and held["format.weight.clip"] == "[0.5, 1]"
        assert not {"run_root", "model.hf_token"} & {*held}


def test_only_the_runs_asked_for(tmp_path):
    ids = [store_run(tmp_path, index) for index in range(4)]
    assert {
        run["id"]
        for run in embedded(write_page(tmp_path, tmp_path / "page.html", ids[1:3]))["runs"]
    } == {*ids[1:3]}


def test_unfinished_and_damaged_runs_are_shown_as_far_as_they_got(tmp_path):
    failed = store_run(tmp_path, 0, "failed", HOSTILE)
    damaged = store_run(tmp_path, 1)
    put(tmp_path / damaged / "config.yaml", "a: [")
    put(tmp_path / damaged / "outliers.json", "{")
    again = (
        '{"step": 0, "block/rel_error": 2}\n'
        '{"step": 0, "block/rel_error": 1}\n'
        '{"step": 1, "block/rel_error": NaN}\n7\n'
    )
    put(tmp_path / damaged / "tracking" / "curves.jsonl", again)
    put(tmp_path / "empty" / "status.json", "{}")
    page = write_page(tmp_path, tmp_path / "page.html")
    runs = {run["id"]: run for run in embedded(page)["runs"]}
    assert runs["empty"] == {"id": "empty", "status": "interrupted", "model": "empty"}
    assert runs[failed]["error"] == HOSTILE.splitlines()[-1] and "figures" not in runs[failed]
    assert runs[failed]["format"] in BITS  # from its id: it never wrote its choices
    assert (
        runs[damaged]["curves"] == {"block/rel_error": [[0], [1]]}
        and "activations" not in runs[damaged]
    )


def test_points_of_a_sweep_are_told_apart(tmp_path):
    ids = sweep(tmp_path / "runs")
    data = embedded(write_page(tmp_path / "runs", tmp_path / "page.html"))
    assert {run["id"]: run["settings"] for run in data["runs"]} == {
        name: f"weight.group_size={16 * 2**index}" for index, name in enumerate(ids)
    }
    (one,) = embedded(write_page(tmp_path / "runs", tmp_path / "page.html", ids[:1]))["runs"]
    assert "settings" not in one  # nothing beside it to be told from


def test_long_curves_are_thinned_to_what_a_panel_shows(tmp_path):
    sweep(tmp_path / "runs", 1)
    (run,) = embedded(write_page(tmp_path / "runs", tmp_path / "page.html"))["runs"]
    steps, losses = run["curves"]["learn/loss"]
    assert steps == [*range(1, 1002, 6), 1001] and losses == [
        float(f"{1 / step:.4g}") for step in steps
    ]
    assert run["curves"]["block/rel_error"][0] == list(range(30))


def test_a_checkpoint_is_shown_by_what_made_it(tmp_path):
    (name,) = sweep(tmp_path / "runs", 1)
    path = tmp_path / "runs" / name / "metrics.json"
    put(
        path,
        json.loads(path.read_text())
        | {"holds": {"format": "int4-w4a4", "transform": "quarot", "solver": None}},
    )
    (run,) = embedded(write_page(tmp_path / "runs", tmp_path / "page.html"))["runs"]
    assert (run["model"], run["format"], run["transform"]) == (
        "zephyr",
        "int4-w4a4",
        "quarot",
    ) and "solver" not in run


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    from plotly.offline import get_plotlyjs

    store_run(tmp_path, 0, "failed", HOSTILE)
    text = write_page(tmp_path, tmp_path / "page.html").read_text("utf-8")
    own = text.replace(get_plotlyjs(), "")
    assert len(own) < len(text) / 10
    assert not re.search(r"https?://|@import|\burl\(|\bfetch\(|XMLHttpRequest", own)
    assert "default-src 'none'" in own
    assert "<img src=x" not in text and own.count("</script>") == 3
