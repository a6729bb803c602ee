"""What computed a run: the harness, the libraries that can change a number, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

from harness.config.plugins import plugins

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "datasets",
    "numpy",
    "scipy",
    "gguf",
    "compressed-tensors",
    "lm-eval",
    "huggingface-hub",
    "hydra-core",
    "omegaconf",
    "wandb",
    "fast-hadamard-transform",
)


def environment() -> dict:
    """Versions and the machine; of the environment variables none, so no secret can be among them.

    What torch knows of the device is added once the run has one: harness/pipeline/devices.py.
    """
    return {
        "harness": version(),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: _installed(name) for name in PACKAGES},
        "plugins": [plugin.release for plugin in plugins()],
    }


def version() -> str | None:
    """What the source's pyproject.toml says, or, where there is none, the installed version."""
    source = ROOT / "pyproject.toml"
    if source.is_file():
        project = tomllib.loads(source.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "harness":  # and no other's, into which it was installed
            return project["version"]
    return _installed("harness")


def commit() -> str | None:
    """The source's git commit, with `-dirty` where tracked files differ from it.

    None where the source is no checkout, or git is missing or refuses.
    """
    if not (ROOT / ".git").exists():
        return None
    describe = ("describe", "--always", "--exclude=*", "--abbrev=40", "--dirty")
    try:
        # no optional locks: a run must not get into the way of who works in the checkout
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(ROOT), *describe],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache  # a process computes with the releases that it imported, whatever is installed meanwhile
def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
