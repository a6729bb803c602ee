"""Commands for stored runs at the terminal: one shown, two compared, those that failed, a page;
damaged runs and bad arguments."""

import json
import math

import pytest
from stored_runs import piped, root, stored

from harness.report.__main__ import main
from harness.store import write, write_json

__all__ = ["piped", "root"]  # fixtures


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["show", "aaaaaaaaa"], ["2 runs match", "gptq-aaaaaaaaa1", "rtn-aaaaaaaaa2"]),
        (["show", "zzz"], ["zzz: no such run", "bbbbbbbbb4"]),
        (["diff", "aaaaaaaaa1", "int4"], ["2 runs match", "bbbbbbbbb3", "bbbbbbbbb4"]),
        (["ls", "frmat=int4"], ["frmat=int4: no such filter", "format"]),
        (["prune", "--yes", "sttus=failed"], ["sttus=failed: no such filter"]),
        (["ls", "--sort", "size"], ["--sort size", "ppl wikitext-2"]),
    ],
    ids=str,
)
def test_bad_arguments_are_one_line(root, capsys, words, names):
    command, *rest = words
    assert main([command, str(root), *rest]) == 2
    got = capsys.readouterr()
    assert got.out == "" and len(got.err.splitlines()) == 1
    assert all(name in got.err for name in names)
    assert len(list(root.glob("tiny*"))) == 4


def test_no_run_root_and_no_such_command(tmp_path, capsys):
    assert main(["ls", str(tmp_path / "absent")]) == 2
    assert "absent: no such folder" in capsys.readouterr().err
    for words in (["remove"], [], ["ls", "--verbose"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)


def test_show(root, capsys):
    assert main(["show", str(root), "aaaaaaaaa1"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "python run.py solver=gptq seed=0",
        "quantized",
        " 0.1000 ",
        " 83.0 ",
        "warning: [careful]",
        "mark wikitext-2: same corpus as calibration; first 8 of 145 windows",
        "layers.8.q_proj",
        "0.080000",
        "layer 3 down_in",
        "30.0 -> 4.0",
        "layer 0 down_in",
        "0.0 -> 7.0",
        "312.0 -> 3.0",
    ):
        assert text in shown
    assert "layers.3.q_proj" not in shown and "traceback" not in shown
    assert main(["show", str(root), "bbbbbbbbb3"]) == 0
    shown = capsys.readouterr().out
    assert "failed in stage solve: RuntimeError: first\nthe last [line]" in shown
    assert f"traceback is in {root / 'tiny-int4-identity-gptq-bbbbbbbbb3' / 'status.json'}" in shown


def test_diff(root, capsys):
    other = root / "tiny-nvfp4-hadamard-rtn-aaaaaaaaa2"
    write(other / "config.yaml", "seed: 0\nsolver: {name: rtn, tasks: ['[a]', b], damp: 0.5}\n")
    assert main(["diff", str(root), "aaaaaaaaa1", "aaaaaaaaa2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in lines
        if "│" in line
    }
    assert (cells["solver.name"], cells["solver.damp"], cells["run_root"]) == (
        ["gptq", "rtn"],
        ["-", "0.5"],
        ["r", "-"],
    )
    assert "seed" not in cells and "solver.tasks" not in cells
    assert cells["KL wikitext-2"] == ["0.1000", "0.4000", "+0.3000"]
    assert cells["wikitext-2"][:4] == [
        "8",
        "+0.30000 ± 0.00000",
        f"{math.exp(0.3):.4f}",
        "0.007812",
    ]
    assert (
        cells["arc_easy"][:3] == ["acc_norm", "40", "100.0"] and float(cells["arc_easy"][-1]) < 0.05
    )
    assert main(["diff", str(root), "aaaaaaaaa1", "aaaaaaaaa1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    p = [line.split("│") for line in lines if line.startswith(("│ wikitext-2", "│ arc_easy"))]
    assert [cells[5].strip() for cells in p[:1]] + [cells[-2].strip() for cells in p[1:]] == [
        "1",
        "1",
    ]


def test_failed(root, capsys):
    assert main(["failed", str(root)]) == 0
    shown = capsys.readouterr().out
    assert "the last [line]" in shown and "RuntimeError" not in shown and "aaaaaaaaa" not in shown
    assert (
        "bbbbbbbbb3: python run.py solver=gptq seed=0\n"
        "bbbbbbbbb4: python run.py solver=rtn seed=0\n" in shown
    )


@pytest.mark.parametrize(
    "line", ["ls --sort ppl", "failed", "prune --yes --blocks", "show ddd", "diff ddd a1"]
)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("status.json", ""),
        ("status.json", "[1]"),
        ("metrics.json", '{"run_'),
        ("metrics.json", "[]"),
        ("metrics.json", None),
        (
            "metrics.json",
            '{"stages": null, "choices": null, "layers": null, "marks": 3, "seconds": null}',
        ),
        (
            "metrics.json",
            '{"status": "failed",'
            ' "stages": {"baseline": {"ppl": {"pydoc": null}}, "quantized": {}}}',
        ),
        (
            "metrics.json",
            '{"choices": {"format": 3, "solver": [], "data": {}}, "holds": {"solver": []}}',
        ),
        ("config.yaml", "a: [1"),
        ("config.yaml", None),
        ("config.yaml", "[7]"),
        ("outliers.json", "{"),
        ("samples/quantized/arc_easy.json", "[{}]"),
    ],
    ids=str,
)
def test_broken_runs_never_crash(root, capsys, name, content, line):
    path = stored(root, "tiny-nvfp4-identity-gptq-ddddddddd9")
    (path / name).unlink() if content is None else write(path / name, content)
    command, *rest = line.split()
    assert main([command, str(root), *rest]) == 0
    assert capsys.readouterr().out


def test_a_perplexity_that_is_not_finite_is_shown(root, capsys):
    path = stored(
        root,
        "tiny-nvfp4-identity-gptq-ddddddddd9",
        "failed",
        error="FloatingPointError: not finite",
    )
    metrics = json.loads((path / "metrics.json").read_text())
    write_json(
        path / "metrics.json",
        metrics | {"stages": metrics["stages"] | {"quantized": {"ppl": {"pydoc": math.nan}}}},
    )
    assert main(["show", str(root), "ddddddddd9"]) == 0
    assert "nan" in capsys.readouterr().out


def test_page(root, capsys):
    pytest.importorskip("harness.report.page")
    out = root.parent / "page.html"
    assert main(["page", str(root), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert "aaaaaaaaa1" in out.read_text()
