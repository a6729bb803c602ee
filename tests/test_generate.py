"""A look at the model: its texts are those of whole greedy forwards, and stand side by side
wherever a run is shown; runs without them keep their ids. The chat answers as `generate` does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chromium import browser, opened, silent
from composed import ROOT, small
from page_runs import embedded
from rich.console import Console

import harness
from harness.chat.__main__ import main
from harness.config.build import settings
from harness.config.errors import ConfigError
from harness.evaluation.generate import Generate, continuation
from harness.models.adapter import Adapter
from harness.models.tiny import Tiny
from harness.pipeline.job import execute
from harness.pipeline.plan import make_plan
from harness.report.page import write_page
from harness.report.shapes import metrics as sound
from harness.report.table import run_table
from harness.report.texts import said

__all__ = ["browser"]  # a fixture
PROMPTS = ["The cat | sat", "Once <b>upon"]


@torch.no_grad()
def greedy(model, ids, tokens: int) -> torch.Tensor:
    """By a forward over all that was said before, for every token."""
    for _ in range(tokens):
        logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tokens_are_those_of_whole_forwards(family):
    """In float64, where a forward with a cache rounds as the whole one does."""
    model, tokenizer = Tiny(family=family).load()
    model = model.double()
    ids = tokenizer("Some words, and", return_tensors="pt").input_ids
    wanted = greedy(model, ids, 12)[0, ids.shape[1] :]
    model.generation_config.eos_token_id = None
    assert torch.equal(continuation(Adapter(model), ids, 12), wanted)
    model.generation_config.eos_token_id = [int(wanted[3]), 5]
    ended = continuation(Adapter(model), ids, 12)
    stop = min(i for i, token in enumerate(wanted.tolist()) if token in (int(wanted[3]), 5))
    assert torch.equal(ended, wanted[: stop + 1])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    root = tmp_path_factory.mktemp("generate")
    words = ["eval=generate", "eval.generate.tokens=9", "transform=quarot", "format=w4a4kv4"]
    words += ["format.weight.group_size=32", "export=harness", f"export.path={root / 'out'}"]
    cfg, choices = small(root, *words, "solver=rtn")
    cfg.eval.generate.prompts = PROMPTS
    done = execute(cfg, choices)
    assert done.status == "done", done.error
    return done


def test_both_models_are_asked_as_they_are_served(outcome):
    stages = outcome.metrics["stages"]
    assert list(stages["baseline"]["texts"]) == list(stages["quantized"]["texts"]) == PROMPTS
    assert stages["baseline"]["texts"] != stages["quantized"]["texts"]
    untouched, tokenizer = Tiny().load()
    quantized, _ = harness.load(outcome.metrics["export"]["path"])
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        tokens = greedy(untouched, ids, 9)[0, ids.shape[1] :]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert stages["baseline"]["texts"][prompt] == text
        served = quantized.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(served, skip_special_tokens=True)
        assert stages["quantized"]["texts"][prompt] == text


def test_texts_stand_side_by_side_wherever_a_run_is_shown(outcome, tmp_path):
    rows = said(outcome.metrics["stages"])
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(list(row) == ["prompt", "baseline", "quantized"] for row in rows)

    console = Console(record=True, width=140, file=open(os.devnull, "w"))  # noqa: SIM115
    run_table(outcome.metrics, outcome.run.path, console)
    table = console.export_text()
    page = embedded(write_page(outcome.run.path.parent, tmp_path / "page.html"))
    (run,) = page["runs"]
    assert run["texts"] == [[row["prompt"], row["baseline"], row["quantized"]] for row in rows]
    path = outcome.run.path / "tracking" / "texts.jsonl"  # as W&B gets it
    assert [json.loads(line) for line in path.read_text().split("\n") if line] == rows
    folder = Path(outcome.metrics["export"]["path"])
    assert json.loads((folder / "quantization_metadata.json").read_text())["texts"] == rows
    card = (folder / "README.md").read_text()
    assert "## What it says" in card
    assert r"| The cat \| sat | " in card and r"| Once \<b\>upon | " in card
    for row in rows:
        for stage in ("baseline", "quantized"):
            assert f"  {stage}: {row[stage]!r}" in table


@pytest.mark.browser
def test_a_browser_shows_them_as_they_are(outcome, tmp_path, browser):
    opened(browser, write_page(outcome.run.path.parent, tmp_path / "page.html"))
    rows = said(outcome.metrics["stages"])
    shown = browser.execute_script("""
        const rows = [...document.querySelectorAll("#texts tbody tr")];
        return rows.map(row => [...row.cells].map(cell => cell.textContent));""")
    assert shown == [[row["prompt"], row["baseline"], row["quantized"]] for row in rows]
    silent(browser)


def test_a_run_that_was_not_asked_has_none_of_it(tmp_path):
    done = execute(*small(tmp_path, "format=int4", "solver=rtn"))
    assert said(done.metrics["stages"]) == []
    assert not (done.run.path / "tracking" / "texts.jsonl").exists()
    (run,) = embedded(write_page(done.run.path.parent, tmp_path / "page.html"))["runs"]
    assert "texts" not in run


def test_what_is_stored_may_have_come_from_anywhere():
    stages = {"baseline": {"texts": {"a": 1}}, "quantized": {"texts": {"a": "b"}}}
    assert said(sound({"stages": stages})["stages"]) == [{"prompt": "a", "quantized": "b"}]


def test_prompts_are_part_of_an_id_and_none_leave_it(tmp_path):
    def plan(*words):
        cfg, choices = small(tmp_path, *words)
        return make_plan(settings(cfg), choices)

    plain, one = plan(), plan("eval=generate")
    other = plan("eval=generate", "eval.generate.prompts=[Another]")
    more = plan("eval=generate", "eval.generate.tokens=33")
    assert len({each.run_id for each in (plain, one, other, more)}) == 4
    assert len({each.quant_id for each in (plain, one, other, more)}) == 1
    assert all(mark is None for mark in (x.fingerprint() for x in plain.evaluations.values()))


@pytest.mark.parametrize(
    "section",
    [
        {"prompts": []},
        {"prompts": [""]},
        {"prompts": ["a", "a"]},
        {"prompts": "a"},
        {"prompts": ["a"], "tokens": 0},
        {"prompts": ["a"], "token": 3},
        {"tokens": 3},
    ],
    ids=str,
)
def test_bad_settings_are_refused(section):
    with pytest.raises(ConfigError, match=r"eval\.generate\."):
        Generate.of(section)


def test_chat_answers_each_line_until_the_input_ends(outcome):
    folder = outcome.metrics["export"]["path"]
    done = subprocess.run(
        [sys.executable, "-m", "harness.chat", folder, "--tokens", "7"],
        input="Hello there\n\nand then\n",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = harness.load(folder)
    answers = []
    for line in ("Hello there", "and then"):
        ids = tokenizer(line, return_tensors="pt").input_ids
        found = model.generate(ids, max_new_tokens=7)[0, ids.shape[1] :]
        answers.append(tokenizer.decode(found, skip_special_tokens=True) + "\n")
    assert done.stdout == "".join(answers)


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_conversation_is_put_into_the_template(tmp_path, monkeypatch, capsys):
    model, tokenizer = Tiny().load()
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", bool)
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lines = iter(["Hello", "More"])

    def typed(marker):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    assert main([str(tmp_path), "--tokens", "5"]) == 0
    shown = capsys.readouterr().out
    asked, answers = "", []
    for line in ("Hello", "More"):
        asked += f"[user]{line}[assistant]"
        ids = tokenizer(asked, return_tensors="pt").input_ids
        found = model.generate(ids, max_new_tokens=5)[0, ids.shape[1] :]
        answers.append(tokenizer.decode(found, skip_special_tokens=True))
        asked += answers[-1]
    assert shown == "".join(f"{answer}\n" for answer in answers)


def test_a_folder_that_holds_no_model_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert f"{tmp_path} lacks config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--tokens", "0"], ["--device", "cuda:99"], ["--device", "gpu"]], ids=" ".join
)
def test_a_word_that_cannot_be_is_named(words, tmp_path, capsys):
    model, tokenizer = Tiny().load()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), *words])
    told = capsys.readouterr().err
    assert end.value.code == 2 and f"error: {'='.join(words)}: " in told
    assert "Traceback" not in told


def test_a_folder_for_somebody_else_names_who_loads_it(tmp_path, capsys, monkeypatch):
    Tiny().load()[0].config.save_pretrained(tmp_path)
    (tmp_path / "model.gguf").touch()
    assert main([str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert f"llama.cpp: llama-cli -m {tmp_path / 'model.gguf'}" in told and told.count("\n") == 1
    (tmp_path / "model.gguf").unlink()
    fields = json.loads((tmp_path / "config.json").read_text())
    for method, library, extra in (
        ("compressed-tensors", "compressed_tensors", "export"),
        ("fp_quant", "accelerate", "zeroshot"),
    ):
        monkeypatch.setitem(sys.modules, library, None)
        own = {"quantization_config": {"quant_method": method}}
        (tmp_path / "config.json").write_text(json.dumps(fields | own))
        assert main([str(tmp_path)]) == 2
        assert f'pip install "harness[{extra}]"' in capsys.readouterr().err
