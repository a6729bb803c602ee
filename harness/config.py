"""From a composed configuration to objects and fingerprints. Imports no torch: a stored result is found without it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from omegaconf import OmegaConf

from harness.checks import boolean, integer, known_keys, nearest, one_of
from harness.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("model", "data", "format", "transform", "solver", "eval", "export", "tracking",
            "seed", "device", "on_error", "force", "run_root")
RESULTS_VERSION = 2  # raised by every change that moves a number, so that no stale result is replayed


def build(node, field: str = ""):
    """Instantiate `node` (a plain container with `_target_` keys), limited to this package's classes and functions.

    A part whose `bits` is 16 is off and becomes None. Raises ConfigError for a foreign target or an unknown key of `field`.
    """
    if isinstance(node, list):
        return [build(item, field) for item in node]
    if not isinstance(node, Mapping):
        return node
    if node.get("bits") == 16:
        return None
    target = node.get("_target_")
    arguments = {k: build(v, f"{field}.{k}" if field else k) for k, v in node.items() if k != "_target_"}
    if target is None:
        if "_target_" in node or "bits" in node:
            raise ConfigError(f"{field}._target_={target}: names no class, so nothing can be built from {field}.")
        return arguments
    module, _, name = str(target).rpartition(".")
    if module.partition(".")[0] != "harness":
        raise ConfigError(f"{field}._target_={target}: only classes of this package (harness.*) are built.")
    try:
        factory = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        raise ConfigError(f"{field}._target_={target}: there is no such class.") from None
    known = inspect.signature(factory).parameters
    for key in arguments:
        if key not in known:
            raise ConfigError(f"{field}.{key}: {name} has no such field.{nearest(key, known)} Fields: {', '.join(known)}.")
    try:
        return factory(**arguments)
    except ConfigError as error:  # a class knows its fields, only the configuration knows where they stand
        raise ConfigError(str(error).replace(f"{name}: ", f"{field}.", 1)) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{field}: {name} cannot be built from {arguments} ({error}).") from None


def option(group: str, name: str) -> dict:
    """The settings of one option of a config group, e.g. `option("data", "pydoc")`, with those it inherits, as a plain
    container."""
    path = ROOT / "conf" / group / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ConfigError(f"{group}={name}: no such option.{nearest(name, known)} Options: {', '.join(known)}.")
    own = OmegaConf.load(path)
    inherited = [option(group, other) for other in own.pop("defaults", []) if isinstance(other, str) and other != "_self_"]
    return OmegaConf.to_container(OmegaConf.merge(*inherited, own), resolve=True)


def settings(cfg) -> dict:
    """The resolved configuration as a plain dict, its root fields checked."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    known_keys("", plain, SECTIONS)
    for field in SECTIONS:
        if field not in plain:
            raise ConfigError(f"{field}: this setting was deleted, and nothing runs without it.")
    for field in ("model", "data", "format", "transform", "solver", "eval", "export", "tracking", "data.calibration",
                  "eval.perplexity", "format.weight", "format.act", "format.kv"):
        if not isinstance(_at(plain, field), dict):
            raise ConfigError(f"{field}={_at(plain, field)}: this is a group of settings; set one of those inside it.")
    integer("seed", plain["seed"], low=0)
    if not isinstance(plain["run_root"], str) or not plain["run_root"]:
        raise ConfigError(f"run_root={plain['run_root']}: needs a folder.")
    one_of("on_error", plain["on_error"], ("raise", "record"))
    boolean("force", plain["force"])
    device = plain["device"]
    if device not in ("auto", "cpu", "cuda") and not (str(device).startswith("cuda:") and str(device)[5:].isdigit()):
        raise ConfigError(f"device={device}: needs auto, cpu, cuda or cuda:N.")
    return plain


def _at(settings: dict, field: str):
    for key in field.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


def fingerprint(*parts) -> str:
    """Ten hex digits over plain containers; key order does not matter."""
    text = json.dumps([RESULTS_VERSION, *parts], sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
