"""From a composed configuration to objects and fingerprints.

Imports no torch: a stored result is found without it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints, overload

from omegaconf import DictConfig, OmegaConf

from harness.config.checks import integer, known_keys, nearest, one_of, typed
from harness.config.errors import ConfigError

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = __name__.partition(".")[0]
WINDOWS = {"windows": int | None, "length": int}
FIELDS = {  # {section: {setting: its type}} of what no class is built from
    "": {
        "model": Mapping,
        "data": Mapping,
        "format": Mapping,
        "transform": Mapping,
        "solver": Mapping,
        "eval": Mapping,
        "export": Mapping,
        "tracking": Mapping,
        "seed": int,
        "device": str,
        "on_error": str,
        "force": bool,
        "run_root": str,
    },
    "data.calibration": WINDOWS | {"order": str, "path": str | None, "activations": str},
    "format": {
        "name": str,
        "weight": Mapping,
        "act": Mapping,
        "kv": Mapping,
        "overrides": Mapping | None,
        "auto": Mapping | None,
    },
    "eval": {
        "name": str,
        "perplexity": Mapping,
        "layer_windows": int | None,
        "streaming": bool,
        "zeroshot": Mapping | None,
        "evaluations": Mapping[str, Mapping],
    },
    "eval.perplexity": WINDOWS | {"corpora": list[str]},
}
# Raised by every change that moves a number, so that no stale result is replayed.
RESULTS_VERSION = 3


@overload
def build(node: Mapping, field: str, base: type[T]) -> T: ...
@overload
def build(node: Mapping, field: str, base: UnionType) -> Any: ...
def build(node: Mapping, field: str, base: type | UnionType):
    """An instance of the class that `node["_target_"]` names, from the other keys.

    None where `bits` is 16: the part is off.

    base: a class, or a union of some; only classes under it that this package itself defines are
    built, whatever else a module of it imports. Values stay plain: a `_target_` inside one builds
    nothing. Keys and types are checked of a part that is off, too. Raises ConfigError naming
    `field`, which tells where the node stands.
    """
    target = node.get("_target_")
    off = node.get("bits") == 16
    if target is None:
        if off:
            known_keys(f"{field}.", node, ("bits", "_target_"))
            return None
        group = field.partition(".")[0]
        raise ConfigError(
            f"{field}={dict(node)}: the option of {group} has no class for it; choose another "
            f"{group}."
        )
    cls = _class(str(target), field, base)
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    hints = get_type_hints(cls if is_dataclass(cls) else cls.__init__)
    typed(
        f"{field}.",
        arguments,
        {key: hints.get(key, object) for key in inspect.signature(cls).parameters},
    )
    if off:
        return None
    try:
        return cls(**arguments)
    except ConfigError as error:
        # a class knows its fields, only the configuration knows where they stand
        raise ConfigError(str(error).replace(f"{cls.__name__}: ", f"{field}.", 1)) from None
    except TypeError as error:  # a field without a default was left out, or the class is abstract
        raise ConfigError(
            f"{field}: {cls.__name__} cannot be built from {arguments} ({error})."
        ) from None


def _class(target: str, field: str, base: type | UnionType) -> type:
    """The class of that name. Raises ConfigError where it is none of ours, or of another kind than
    `base`.
    """
    module, _, name = target.rpartition(".")
    if module.partition(".")[0] != PACKAGE:
        raise ConfigError(
            f"{field}._target_={target}: only classes of this package ({PACKAGE}.*) are built."
        )
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        raise ConfigError(f"{field}._target_={target}: there is no such class.") from None
    ours = isinstance(cls, type) and cls.__module__.partition(".")[0] == PACKAGE
    if not ours or not issubclass(cls, base):
        legal = (base,) if isinstance(base, type) else get_args(base)
        kinds = " or ".join(kind.__name__ for kind in legal)
        raise ConfigError(
            f"{field}._target_={target}: no class of this package that can stand there ({kinds})."
        )
    return cls


def option(group: str, name: str) -> dict:
    """The settings of one option of a config group, e.g. `option("data", "pydoc")`, with those it
    inherits, as a plain container.
    """
    path = ROOT / "conf" / group / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ConfigError(
            f"{group}={name}: no such option.{nearest(name, known)} Options: {', '.join(known)}."
        )
    section = OmegaConf.load(path)
    assert isinstance(section, DictConfig)
    inherited = [
        option(group, other)
        for other in section.pop("defaults", [])
        if isinstance(other, str) and other != "_self_"
    ]
    return _plain(OmegaConf.merge(*inherited, section))


def _plain(cfg) -> dict:
    """A composed configuration as plain containers, its interpolations resolved."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return plain


def settings(cfg) -> dict:
    """The resolved configuration as a plain dict.

    Sections that no class is built from are checked as far as FIELDS goes.
    """
    plain = _plain(cfg)
    for section, hints in FIELDS.items():
        part: Any = plain  # whatever the user wrote there, until it is checked
        for key in filter(None, section.split(".")):
            part = part.get(key)
        typed(f"{section}." if section else "", part, hints, needed=hints)
    integer("seed", plain["seed"], low=0)
    one_of("on_error", plain["on_error"], ("raise", "record"))
    device = plain["device"]
    if device not in ("auto", "cpu", "cuda") and not (
        device.startswith("cuda:") and device[5:].isdigit()
    ):
        raise ConfigError(f"device={device}: needs auto, cpu, cuda or cuda:N.")
    if not plain["run_root"]:
        raise ConfigError(f"run_root={plain['run_root']}: needs a folder.")
    return plain


def fingerprint(*parts) -> str:
    """Ten hex digits over plain containers; key order does not matter."""
    text = json.dumps([RESULTS_VERSION, *parts], sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
