"""The suite and the bench on a GPU: `make gpu`. Installs nothing; says what is missing.

Tests of a package that is not there are skipped by its name (conftest.py).
"""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORKERS = 14


def missing() -> list[str]:
    """The requirements of pyproject.toml, extras included, that are not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    names = {re.split(r"[\[<>=~!; ]", line)[0] for line in [*project["dependencies"], *extras]}
    absent = []
    for name in sorted(names - {project["name"]}):
        try:
            version(name)
        except PackageNotFoundError:
            absent.append(name)
    return absent


def main() -> int:
    if find_spec("torch") is None or find_spec("pytest") is None:
        print(f"make gpu: {sys.executable} has no torch or no pytest; name one with PYTHON=...")
        return 1
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device here; `make test` is for the CPU")
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"not installed: {', '.join(missing()) or 'nothing'}")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    suite = ["-m", "pytest", "--device", "cuda", "tests"]
    if find_spec("xdist") is not None:
        suite += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    status = subprocess.run([sys.executable, *suite], cwd=ROOT, env=env).returncode
    bench = subprocess.run([sys.executable, "tests/bench.py", "gpu"], cwd=ROOT, env=env)
    return status or bench.returncode


if __name__ == "__main__":
    sys.exit(main())
