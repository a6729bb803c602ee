"""Libraries that only some runs need: which extra of the package brings each, and what is said
where it is not installed. They are imported where they are used, after `need`."""

from __future__ import annotations

from importlib.util import find_spec

from harness.config.errors import ConfigError

EXTRAS = {  # importable name: (distribution, extra)
    "accelerate": ("accelerate", "zeroshot"),
    "compressed_tensors": ("compressed-tensors", "export"),
    "datasets": ("datasets", "datasets"),
    "gguf": ("gguf", "gguf"),
    "hydra_plugins.hydra_joblib_launcher": ("hydra-joblib-launcher", "sweep"),
    "hydra_plugins.hydra_submitit_launcher": ("hydra-submitit-launcher", "slurm"),
    "lm_eval": ("lm-eval", "zeroshot"),
    "plotly": ("plotly", "report"),
    "scipy": ("scipy", "report"),
    "wandb": ("wandb", "wandb"),
}


def installed(library: str) -> bool:
    """Whether a library can be imported; nothing of it runs."""
    try:
        return find_spec(library) is not None
    except (ImportError, ValueError):  # the package around it is missing, or it is blocked
        return False


def lacking(library: str, who: str, extra: str | None = None) -> str:
    """What is said where `who`, a setting or a command, needs a library that is not there.

    extra: the one that brings all that `who` needs, where that is another than the library's own.
    A library that none brings is called by its importable name.
    """
    if library not in EXTRAS:
        return f"{who} needs the package {library}, which is not installed"
    package, own = EXTRAS[library]
    return f'{who} needs the package {package}: pip install "harness[{extra or own}]"'


def need(library: str, who: str, extra: str | None = None) -> None:
    """Raise ConfigError where a library is not installed. See `lacking`."""
    if not installed(library):
        raise ConfigError(f"{lacking(library, who, extra)}.")
