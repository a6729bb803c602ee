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
from types import UnionType
from typing import Protocol, TypeVar, get_type_hints, overload

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError

from harness.config import options
from harness.config.checks import device, integer, known_keys, one_of, typed
from harness.config.errors import ConfigError
from harness.config.extras import installed, lacking
from harness.config.paths import expanded
from harness.config.plugins import plugins

PACKAGE = __name__.partition(".")[0]
WINDOWS = {"windows": int | None, "length": int}
FIELDS = {  # {section: {setting: its type}} of what no class is built from
    "": {
        "model": Mapping,
        "data": Mapping,
        "format": Mapping,
        "transform": Mapping,
        "solver": Mapping,
        "tune": Mapping,
        "eval": Mapping,
        "export": Mapping,
        "tracking": Mapping,
        "seed": int,
        "device": str,
        "on_error": str,
        "force": bool,
        "run_root": str,
    },
    "data.calibration": WINDOWS
    | {
        "order": str,
        "path": str | None,
        "corpora": list[str] | None,
        "activations": str,
        "experts": str,
    },
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
        "generate": Mapping | None,
        "evaluations": Mapping[str, Mapping],
    },
    "eval.perplexity": WINDOWS | {"corpora": list[str]},
}
# settings that name a file or folder, and that several rooms read
PATHS = (
    "run_root",
    "export.path",
    "transform.save",
    "transform.load",
    "eval.zeroshot.data_path",
    "eval.zeroshot.include_path",
)
# raised by every change that moves a number, so that no stale result is replayed
RESULTS_VERSION = 3


class HasBits(Protocol):
    """What 16 bits switch off: a number format."""

    @property
    def bits(self) -> int: ...


B = TypeVar("B", bound=HasBits)
T = TypeVar("T")


@overload
def build(node: Mapping, field: str, base: type[B]) -> B | None: ...
@overload
def build(node: Mapping, field: str, base: type[T]) -> T: ...
def build(node: Mapping, field: str, base: type | UnionType) -> object:
    """An instance of the class that `node["_target_"]` names, from the other keys.

    None where `bits` is 16: the part is off; null is the width of INT16. base: a class, or a
    union of some; only classes under it that this package itself or a plug-in (plugins.py) defines
    are built, whatever else a module of theirs imports. Values stay plain: a `_target_` inside one
    builds nothing. Keys and types are checked of a part that is off, too. Raises ConfigError naming
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
            f"{field}={dict(node)}: the option of {group} has no class for it; "
            f"choose another {group}."
        )
    cls = class_of(str(target), field, base)
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    # what has no other width than 16, which as a setting would be off
    if getattr(cls, "bits", None) == 16 and arguments.get("bits", 16) is None:
        del arguments["bits"]
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
    except TypeError as error:
        # a field without a default was left out, or the class is abstract
        raise ConfigError(
            f"{field}: {cls.__name__} cannot be built from {arguments} ({error})."
        ) from None


def class_of(target: str, field: str, base: type | UnionType) -> type:
    """The class of that name, of this package or of a plug-in.

    Raises ConfigError where it is none of ours, or of another kind than `base`, and, with the extra
    that brings it, where its file needs a library that is not installed.
    """
    module, _, name = target.rpartition(".")
    package = module.partition(".")[0]
    where = f"{field}._target_={target}"
    if not _builds(package):
        raise ConfigError(
            f"{where}: only classes of this package ({PACKAGE}.*) and of installed plug-ins are "
            "built."
        )
    try:
        candidate = getattr(import_module(module), name, None)
    except ImportError as error:
        library = (error.name or package).partition(".")[0]
        if library == package:  # the file itself
            candidate = None
        elif installed(library):  # another release of what the file needs
            raise ConfigError(f"{where} cannot be imported: {error}.") from None
        else:
            raise ConfigError(f"{lacking(library, where)}.") from None
    if candidate is None:
        raise ConfigError(f"{where}: there is no such class.")
    ours = isinstance(candidate, type) and _builds(candidate.__module__.partition(".")[0])
    if not ours or not issubclass(candidate, base):
        bases = base.__args__ if isinstance(base, UnionType) else [base]
        kinds = " or ".join(kind.__name__ for kind in bases)
        raise ConfigError(f"{where}: no class of this package that can stand there ({kinds}).")
    return candidate


def _builds(package: str) -> bool:
    """Whether classes that a package defines are built."""
    return package == PACKAGE or package in [plugin.package for plugin in plugins()]


def option(group: str, name: str) -> dict:
    """The settings of an option of a config group, e.g. `option("data", "pydoc")`, as plain values.

    Those that it inherits are among them. Raises ConfigError where there is no such option.
    """
    own = OmegaConf.load(options.file(group, name))
    assert isinstance(own, DictConfig)  # every file of conf is a mapping
    defaults = own.pop("defaults", [])
    inherited = [
        option(group, other) for other in defaults if isinstance(other, str) and other != "_self_"
    ]
    return _plain(OmegaConf.merge(*inherited, own))


def _plain(config: object) -> dict:
    """A composed mapping as plain values, references resolved.

    Raises ConfigError naming the setting whose reference leads nowhere.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except InterpolationKeyError:
        raise  # hints.py says which setting there is not
    except InterpolationResolutionError as error:
        why = str(error).splitlines()[0]
        written = OmegaConf.to_container(config, resolve=False)
        for key in str(error.full_key).split("."):
            written = written[key] if isinstance(written, dict) else written
        raise ConfigError(
            f"{error.full_key}={written}: what it is taken from has another form ({why}); set one "
            "of the two."
        ) from None
    assert isinstance(values, dict)
    return values


def settings(cfg: DictConfig) -> dict:
    """The resolved configuration as a plain dict, with home folders where paths begin with ~.

    Sections that no class is built from are checked as far as FIELDS goes.
    """
    plain = _plain(cfg)
    for section, hints in FIELDS.items():
        values: object = plain
        for key in filter(None, section.split(".")):
            assert isinstance(values, dict)  # FIELDS has a section after the one it stands in
            values = values.get(key)
        typed(f"{section}." if section else "", values, hints, needed=hints)
    integer("seed", plain["seed"], low=0)
    one_of("on_error", plain["on_error"], ("raise", "record"))
    device("device", plain["device"], ("auto", "cpu", "cuda"))
    if not plain["run_root"]:
        raise ConfigError(f"run_root={plain['run_root']}: needs a folder.")
    _expand(plain)
    return plain


def _expand(plain: dict) -> None:
    """Put home folders into the settings that no class reads as paths."""
    for setting in PATHS:
        *sections, key = setting.split(".")
        values = plain
        for section in sections:
            values = values.get(section) or {}
        if isinstance(values.get(key), str) and values[key].startswith("~"):
            values[key] = str(expanded(values[key]))


def fingerprint(*parts) -> str:
    """Ten hex digits over plain containers; key order does not matter."""
    text = json.dumps([RESULTS_VERSION, *parts], sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
