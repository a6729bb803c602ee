"""lm-eval's own command on a checkpoint of ours: the numbers of the run that made it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composed import ROOT, small
from test_zeroshot import CHOICES, WORDS

from harness.config.errors import DataError
from harness.evaluation.agreement import documents
from harness.evaluation.zeroshot import ZeroShot, tasks_for_lm_eval, zeroshot
from harness.lm_eval.__main__ import main
from harness.lm_eval.tasks import write_tasks
from harness.models.tiny import Tiny
from harness.pipeline.job import execute


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tasks").mkdir()
    rows = [{**row, "query": f"Read:\u2028{row['query']}\x85", "id": None} for row in CHOICES]
    for name, each in (("sums", rows), ("words", WORDS)):
        lines = (json.dumps(row, ensure_ascii=False) for row in each)
        (tmp_path / "tasks" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "tasks"


SCOPES = ("token", "tensor")
COMMANDS = """
import json, sys
from harness.lm_eval.__main__ import main
for words in json.loads(sys.argv[1]):
    assert main(words) == 0
"""


@pytest.fixture
def scored(tmp_path, folder):
    """{scope of activation scales: (the run, lm-eval's results and samples of its checkpoint)}; one
    process, for it takes longer to start than to score."""
    outcomes = {}
    commands = []
    for scope in SCOPES:
        own = tmp_path / scope
        run = ["eval=zeroshot", "eval.zeroshot.tasks=[agreement,sums,words]"]
        run += ["eval.zeroshot.limit=10", f"eval.zeroshot.data_path={folder}", "transform=quarot"]
        run += ["format=nvfp4", "solver=rtn", f"format.act.scope={scope}", "format.kv.bits=4"]
        outcome = execute(*small(own, *run, "export=harness", f"export.path={own / 'out'}"))
        assert outcome.status == "done", outcome.error
        outcomes[scope] = outcome
        words = ["--model", "harness", "--batch_size", "8", "--limit", "10", "--log_samples"]
        words += ["--model_args", f"pretrained={outcome.metrics['export']['path']}"]
        words += ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
        words += ["--tasks", "agreement,sums,words", "--data_path", str(folder)]
        commands.append([*words, "--output_path", str(own / "scores")])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|sums") == 2
    return {scope: (outcome, tmp_path / scope / "scores") for scope, outcome in outcomes.items()}


def test_its_numbers_are_those_of_the_run(scored):
    """Every accuracy; every log-likelihood too, to the last bit where requests are not batched."""
    for scope, (outcome, scores) in scored.items():
        results = json.loads(next(scores.rglob("results_*.json")).read_text())["results"]
        wanted = outcome.metrics["stages"]["quantized"]["zeroshot"]
        assert set(results) == set(wanted)
        for task, figures in wanted.items():
            for metric in {"acc", "acc_norm", "acc_stderr"} & figures.keys():
                assert results[task][f"{metric},none"] == figures[metric], (task, metric)
            kept = json.loads((outcome.run.path / f"samples/quantized/{task}.json").read_text())
            path = next(scores.rglob(f"samples_{task}_*.jsonl"))
            lines = [json.loads(line) for line in path.read_text().split("\n") if line]
            found = [[float(answer[0]) for answer in line["filtered_resps"]] for line in lines]
            likely = [each["scores"] for each in kept]
            if scope == "tensor":
                assert found == likely
                continue
            # the command puts requests of several tasks in one batch
            for one, other in zip(found, likely, strict=True):
                assert one == pytest.approx(other, rel=1e-4)


def test_task_files_hold_the_documents_as_they_are_read(tmp_path, folder):
    from lm_eval.tasks import TaskManager

    (tmp_path / "files").mkdir()
    names = write_tasks(str(folder), tmp_path / "files")
    assert names == ["agreement", "sums", "words"]
    manager = TaskManager(include_path=str(tmp_path / "files"), include_defaults=False)
    found = manager.load(names)["tasks"]
    chosen = ZeroShot(tuple(names), data_path=str(folder))
    wanted = TaskManager(include_defaults=False).load(tasks_for_lm_eval(chosen))["tasks"]
    for name in names:
        theirs, ours = (list(each[name].test_docs()) for each in (found, wanted))
        assert theirs == ours
        for one, other in zip(theirs, ours):
            assert found[name].doc_to_text(one) == wanted[name].doc_to_text(other)
    assert [dict(row) for row in found["agreement"].test_docs()] == documents()


@pytest.fixture
def handed(monkeypatch):
    """words -> (what lm-eval is given of them, {its folder of tasks: files in it})."""

    def command(*words):
        got = []

        def evaluate():
            given = sys.argv[1:]
            found = {w: {f.stem for f in Path(w).glob("*.yaml")} for w in given if Path(w).is_dir()}
            got.append((given, found))

        monkeypatch.setattr("lm_eval.__main__.cli_evaluate", evaluate)
        assert main(words) == 0
        return got[0]

    return command


@pytest.mark.parametrize(
    "words",
    [
        ["--tasks", "sums"],
        ["--tasks=sums"],
        ["-t", "sums"],
        ["-tsums"],
        ["--task", "sums"],
        ["validate", "-t", "sums"],
        ["ls", "tasks"],
        ["--config", "asked.yaml"],
    ],
    ids=" ".join,
)
def test_the_data_folder_is_there_however_tasks_are_asked_for(
    words, folder, handed, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("asked.yaml").write_text("tasks: [sums]")
    for line in ([*words, "--data_path", str(folder)], [f"--data_path={folder}", *words]):
        given, found = handed(*line)
        assert given[:-2] == words and given[-2] == "--include_path"
        assert found[given[-1]] == {"agreement", "sums", "words"}
    if words != ["ls", "tasks"]:
        given, found = handed(*words)
        assert given[:-2] == words and found[given[-1]] == {"agreement"}


@pytest.mark.parametrize(
    "words",
    [
        ["--tasks=mine", "--include_path", "own"],
        ["ls", "tasks", "--include_path=own"],
        ["-C", "own.yaml"],
        ["-C", "own.yaml", "--tasks", "mine"],
        ["--help"],
        [],
    ],
    ids=" ".join,
)
def test_all_other_words_are_lm_evals(words, handed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("tasks: mine\ninclude_path: own")
    assert handed(*words)[0] == words
    if "--help" not in words and words:
        assert main([*words, "--data_path", "."]) == 2


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--data_path", "/nowhere"], "--data_path /nowhere: is no folder"),
        (["--data_path", ".", "--include_path", "."], "give one of them"),
    ],
)
def test_bad_words_are_refused(words, error, capsys):
    before = list(sys.argv)
    assert main(["--model", "harness", "--tasks", "sums", *words]) == 2
    assert error in capsys.readouterr().err
    assert sys.argv == before
    with pytest.raises(DataError):
        write_tasks("/nowhere", Path())


def test_the_same_as_with_its_report_of_the_machine(folder):
    """simple_evaluate lists the machine's packages besides; nothing else differs."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = Tiny().load()
    chosen = ZeroShot.of({
        "tasks": ["agreement", "sums", "words"],
        "data_path": str(folder),
        "limit": 9,
        "shots": {"sums": 2},
    })  # fmt: skip
    assert chosen is not None
    state = torch.random.get_rng_state()
    figures, samples = zeroshot(model, tokenizer, chosen)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, task in zip(chosen.tasks, tasks_for_lm_eval(chosen)):
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=[task],
            num_fewshot={"sums": 2}.get(name),
            limit=9,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=100,
        )
        plain = {key.partition(",")[0]: x for key, x in found["results"][name].items()}
        assert {key: plain[key] for key in figures[name] if key != "n"} == {
            key: x for key, x in figures[name].items() if key != "n"
        }
        answers = [
            [answer[0] if isinstance(answer, tuple) else answer for answer in doc["filtered_resps"]]
            for doc in found["samples"][name]
        ]
        assert [doc["scores"][0] for doc in samples[name]] == [answer[0] for answer in answers]
