"""The wheel in an environment of its own: what it requires and nothing else, no checkout in reach.

The environment's libraries are links to those under test; each test runs in an empty folder.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path

import pytest
from composed import ROOT, SMALL
from imports import modules
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_readme import examples

from harness.calibration.shipped import Pydoc
from harness.config.errors import ConfigError
from harness.config.extras import EXTRAS
from harness.models.wheel import Wheel
from harness.report import paired
from harness.store import locked

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE = [word for word in SMALL if not word.startswith("tracking=")]
TEXT = ["data=text", "data.path=../text", "data.name=own", "eval.perplexity.corpora=[data]"]
MANY = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from harness.command.main import main

told = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
    told.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(told))
"""


def required(names: list[str]) -> set[str]:
    """The distributions that these requirements bring, without extras that they do not ask for."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        one = waiting.pop()
        wanted = one.marker is None or one.marker.evaluate({"extra": ""})
        if one.name in found or not wanted:
            continue
        found.add(one.name)
        waiting += map(Requirement, distribution(one.name).requires or [])
    return found


def plain() -> dict[str, str]:
    """This process's environment less what shows a Python, pip too, other packages than its own."""
    return {key: x for key, x in os.environ.items() if not key.startswith(("PYTHON", "HARNESS"))}


def built(folder: Path) -> Path:
    """The wheel, of a copy of the sources: a build leaves files beside them."""
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("harness", "conf", "sweeps"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(folder / "source"), *options], check=True
    )
    shutil.rmtree(folder / "source")
    return next(folder.glob("*.whl"))


def install(wheel: Path, folder: Path) -> None:
    """An environment that has the wheel, by pip, and the libraries that it requires, by links."""
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    options = ["--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "install", *options, str(wheel)], check=True, env=plain())
    (site,) = folder.glob("lib/python*/site-packages")
    (own,) = site.glob("harness-*.dist-info")
    for name in required(Distribution.at(own).requires or []):
        library = distribution(name)
        for top in {file.parts[0] for file in library.files or []} - {"..", "__pycache__"}:
            place = site / top
            if not place.exists():
                place.symlink_to(Path(str(library.locate_file(top))))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder with the wheel, the environment and a short text, made once by whoever is first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "package"
    with locked(folder.parent / "package.lock", wait=True):
        if not (folder / "ready").exists():
            install(built(folder), folder / "environment")
            for name, part in (("train", "calibration"), ("test", "evaluation")):
                path = folder / "text" / f"{name}.txt"
                path.parent.mkdir(exist_ok=True)
                path.write_text(Pydoc().text(part)[:8000])
            (folder / "ready").touch()
    return folder


@pytest.fixture
def run(shared, tmp_path):
    """Runs a command of the environment in an empty folder: words -> CompletedProcess."""
    (tmp_path / "here").mkdir()
    (tmp_path / "text").symlink_to(shared / "text")

    def command(program, *words, typed="", **variables):
        return subprocess.run(
            [shared / "environment" / "bin" / program, *words],
            cwd=tmp_path / "here",
            env={**plain(), "COLUMNS": "200", "OMP_NUM_THREADS": "1", **variables},
            input=typed,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return command


@pytest.fixture
def many(run):
    """Several command lines in one process: lists of words -> [(status, stdout, stderr)]."""

    def commands(*lines, **variables):
        got = run("python", "-c", MANY, json.dumps(lines), **variables)
        assert got.returncode == 0, got.stderr
        return json.loads(got.stdout.splitlines()[-1])

    return commands


def test_the_wheel_holds_every_file_of_the_package_and_every_option(shared):
    (wheel,) = shared.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("harness/")}
    ours = {str(path.relative_to(ROOT)) for path in modules().values()}
    ours |= {"harness/py.typed", *(f"harness/report/assets/{n}" for n in ("page.js", "page.css"))}
    # not the runs that are kept in sweeps/kept
    options = [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "sweeps").glob("*.yaml")]
    ours |= {f"harness/{path.relative_to(ROOT)}" for path in options}
    assert ours <= held
    assert {name for name in held - ours if not name.startswith("harness/report/assets/")} == set()


def test_a_run_where_nothing_else_is_installed(run, tmp_path):
    """Results lie in the current folder, they know the version, W&B is missed once, and what was
    exported answers."""
    line = [*BASE, *TEXT, "format=nvfp4", "transform=quarot", "solver=gptq"]
    line += ["export=harness", "export.path=../out"]
    got = run("harness", *line)
    assert got.returncode == 0, got.stderr
    assert got.stderr.count('pip install "harness[wandb]"') == 1
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["runs"]
    (folder,) = (tmp_path / "here" / "runs").glob("tiny-nvfp4-quarot-gptq-*")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["command"].startswith("harness model=tiny ")
    assert metrics["bits_per_weight"] == pytest.approx(4.5, rel=1e-3)
    about = json.loads((folder / "environment.json").read_text())
    assert (about["harness"], about["commit"]) == (PROJECT["version"], None)
    assert about["packages"]["wandb"] is about["packages"]["lm-eval"] is None
    chat = run("harness", "chat", metrics["export"]["path"], "--tokens", "3", typed="Hello\n\n")
    assert (chat.returncode, chat.stdout.count("\n")) == (0, 1), chat.stderr


def test_the_commands_beside_a_run(many, tmp_path):
    grid = ["-m", *BASE, *TEXT, "format=none", "solver=none", "seed=0,1"]
    version, shipped, swept, listed, page, structure, scored, odd, words = many(
        ["--version"],
        ["--cfg", "hydra", "sweeps=bits"],
        grid,
        ["report", "ls"],
        ["report", "page"],
        ["structure", "nowhere/at all"],
        ["lm_eval", "--model", "harness", "--tasks", "agreement"],
        ["reprot", "ls"],
        ["format=nvfp5"],
    )
    assert version == [0, f"harness {PROJECT['version']}\n", ""]
    assert "format.weight.bits" in shipped[1], "a grid of the wheel"
    assert swept[0] == 0, swept
    assert "2 jobs, 0 failed" in swept[1] and "a row again: harness " in swept[1]
    assert 'page: it needs the package plotly: pip install "harness[report]"' in swept[1]
    assert swept[2].count('pip install "harness[wandb]"') == 1
    assert listed[0] == 0 and "2 runs" in listed[1]
    assert page[0] == 2 and 'pip install "harness[report]"' in page[2]
    assert structure[0] == 2 and "nowhere/at all" in structure[2]
    assert scored[:2] == [2, ""] and scored[2].count("\n") == 1
    assert 'harness lm_eval needs the package lm-eval: pip install "harness[zeroshot]"' in scored[2]
    assert odd[0] == 2 and "Did you mean report?" in odd[2]
    assert words[0] == 2 and "nvfp4" in words[2]


NEEDS = [
    (["eval=zeroshot"], "eval.zeroshot", "lm-eval", "zeroshot"),
    (["data=wikitext2"], "data=wikitext2", "datasets", "datasets"),
    (["format=auto"], "format.auto", "scipy", "auto"),
    (["format=int4", "export=compressed_tensors"], "export=", "compressed-tensors", "export"),
    (["format=int4", "export=gguf"], "export._target_", "gguf", "gguf"),
    (["-m", "hydra/launcher=slurm"], "hydra/launcher=slurm", "hydra-submitit-launcher", "slurm"),
]


def test_what_a_run_lacks_is_one_sentence_before_it_begins(many, tmp_path):
    lines = [[*BASE, *words] for words, *_ in NEEDS]
    for (status, out, told), (_, who, package, extra) in zip(many(*lines), NEEDS):
        assert (status, out, told.count("\n")) == (2, "", 1), told
        assert told.startswith(f"error: {who}")
        assert f'needs the package {package}: pip install "harness[{extra}]"' in told
    assert list((tmp_path / "here").iterdir()) == []


def test_the_python_of_the_readme_runs(run):
    found = examples("README.md")
    assert len(found) == 2
    for example in found:
        got = run("python", "-c", example)
        assert got.returncode == 0, got.stderr


def test_what_asks_for_a_library_later_says_the_same(monkeypatch):
    for library in ("scipy", "gguf"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=r"t test .* scipy: pip install \"harness\[report\]\""):
        paired.losses([0.0] * 30, [0.1 * one for one in range(30)])
    assert paired.losses([0.0] * 3, [0.1, 0.2, 0.3])["p"] == 0.25, "few windows need none"
    monkeypatch.setattr(Wheel, "_files", lambda self: [])
    with pytest.raises(ConfigError, match=r"model.package=own needs .* gguf: .*harness\[gguf\]"):
        Wheel(package="own", architecture={}).check()


def plugin(folder: Path, version: str = "1.2") -> Path:
    """An installed package with a transform, which says when it is imported."""
    code, option = (
        re.search(rf"```{kind}\n(.*?)```", text, re.S)[1]
        for text in [(ROOT / "CONTRIBUTING.md").read_text()]
        for kind in ("python", "yaml")
    )
    files = {
        "flips/__init__.py": "print('flips is imported')\n",
        "flips/flip.py": code,
        "flips/lost.py": "import nowhere\n",
        "flips/conf/transform/lost.yaml": "name: lost\n_target_: flips.lost.Lost\n",
        "flips/conf/transform/flip.yaml": option.replace("harness.transforms.", "flips."),
        "flips-1.dist-info/METADATA": f"Metadata-Version: 2.1\nName: flips\nVersion: {version}\n",
        "flips-1.dist-info/entry_points.txt": "[harness.plugins]\nflips = flips\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_plug_in_is_found_and_runs_only_when_it_is_chosen(many, run, tmp_path):
    path = str(plugin(tmp_path / "plugins"))
    lost = [*BASE, *TEXT, "transform=lost"]
    helped, wrong, lacking = many(["--help"], ["transform=flop"], lost, PYTHONPATH=path)
    assert "flip" in re.search(r"^transform: (.*)$", helped[1], re.M)[1].split(", ")
    assert wrong[0] == 2 and "Did you mean flip?" in wrong[2]
    assert "imported" not in helped[1] + wrong[1]
    assert lacking[0] == 2 and "flips.lost.Lost needs the package nowhere, which" in lacking[2]
    got = run("harness", *BASE, *TEXT, "transform=flip", "solver=rtn", PYTHONPATH=path)
    assert got.returncode == 0, got.stderr
    assert got.stdout.count("flips is imported") == 1
    (folder,) = (tmp_path / "here" / "runs").glob("tiny-nvfp4-flip-rtn-*")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["notes"]["gate"]["max"] < 1e-4
    assert json.loads((folder / "environment.json").read_text())["plugins"] == ["flips==1.2"]


def test_every_library_is_required_or_brought_by_an_extra():
    """And `need` names the extra that brings it."""
    extras = {
        extra: {Requirement(line).name for line in lines}
        for extra, lines in PROJECT["optional-dependencies"].items()
    }
    assert all(package in extras[extra] for package, extra in EXTRAS.values())
    core = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    known = packages_distributions()
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            # vLLM is in an environment of its own, which has us
            for top in {name.partition(".")[0] for name in names} - {"harness", "vllm", *EXTRAS}:
                dists = {canonicalize_name(name) for name in known.get(top, [])}
                assert top in sys.stdlib_module_names or dists & core, f"{module}: {top}"
