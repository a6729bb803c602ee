"""What of a run's settings changes numbers: what its ids are made of, and nothing else.

What only names a thing, or says where it goes, stays out, so that equal work is found under any
name. A setting that came later says nothing where it is as if it were not there: what was stored
before is found.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.calibration.corpus import Corpus
from harness.config import options
from harness.config.build import option
from harness.config.plugins import releases
from harness.evaluation.base import Evaluation
from harness.evaluation.shipped import fingerprints
from harness.pipeline.texts import Windows
from harness.quantize.candidates import named_by

# Settings of solvers that came later, where they change nothing: as conf/solver has them.
MIN_TOKENS = 128
LATER: dict[str, object] = {
    "min_tokens": MIN_TOKENS,
    "stream": "weights",
    "propagate": "none",
    "refit": False,
}
CACHE: dict[str, object] = {  # of format.kv, as conf/format/none.yaml has them
    "kind": "integer",
    "scale": "dynamic",
    "incl0": "always",
    "key_axis": "token",
    "window": 0,
}


def device_kind(name: str) -> str:
    """cpu or cuda, of the setting `device`; looks for a device file, so that torch stays out."""
    if name != "auto":
        return name.partition(":")[0]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    there = any(Path("/dev").glob("nvidia[0-9]*")) and not hidden
    return "cuda" if there else "cpu"


def of_evaluation(
    corpora: Sequence[Corpus],
    windows: Windows,
    amp: str | None,
    evaluations: Mapping[str, Evaluation],
    bos: str,
) -> list:
    """What is evaluated, and how."""
    tested = [[[c.name, c.fingerprint("evaluation")] for c in corpora], vars(windows), amp]
    tested += fingerprints(evaluations)
    # What the model asks for is the model's, and part of its id already.
    if bos != "auto":
        tested.append({"bos": bos})
    return tested


def of_calibration(corpora: Sequence[Corpus], windows: Windows, bos: str, experts: str) -> list:
    """The calibration texts in their order, and what is read of them."""
    asked = [] if bos == "auto" else [{"bos": bos}]
    if experts != "routed":
        asked.append({"experts": experts})
    texts = [corpus.fingerprint("calibration") for corpus in corpora]
    return [texts if len(texts) > 1 else texts[0], vars(windows), *asked]


def of_format(section: Mapping, export: Mapping) -> dict:
    """The format's settings, with what stands behind the options that overrides and candidates
    name, and what changes those."""
    section = _released(_as_before(section))
    behind = {name: name for name in _strings(section["overrides"])}
    for candidate in _strings(section["auto"]):
        name, bits = named_by(candidate)
        behind[candidate if bits is None else f"{name}:{candidate}"] = name
    named = {
        key: _released(_as_before(option("format", name)))
        for key, name in behind.items()
        if options.has("format", name)  # what is no option is refused when the format is built
    }
    if not named:
        return section
    if export.get("serves"):
        # What it changes in the section itself stands there already.
        named["serves"] = export["serves"]
    return {**section, "named": named}


def _as_before(section: Mapping) -> dict:
    """A format's settings without those of the cache that came later, where they say nothing."""
    cache = {key: x for key, x in section["kv"].items() if (key, x) not in CACHE.items()}
    return {**section, "kv": cache}


def of_solver(section: Mapping) -> dict:
    """The solver's settings."""
    propagates = section.get("propagate", "none") != "none"
    kept = {
        key: x
        for key, x in section.items()
        if LATER.get(key, ()) != x and (propagates or not key.startswith("propagate_"))
    }
    return _released(kept)


def of_tune(section: Mapping) -> list:
    """The tuner's settings; nothing where there is none, for runs from before there were any."""
    if not section.get("_target_"):
        return []
    return [_released({key: x for key, x in section.items() if key != "name"})]


def of_transform(section: Mapping) -> dict:
    """The transform's settings as far as they change a number: not where its matrices go, and what
    is in a file read."""
    kept = {key: x for key, x in section.items() if key != "save"}
    path = kept.get("load")
    if isinstance(path, str) and Path(path).is_file():
        # A file may be moved, or written again under its name.
        kept["load"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    return _released(kept)


def _released(section: dict) -> dict:
    """Settings with the releases of the plug-ins whose classes they name: the next ones may compute
    otherwise."""
    named = releases(section)
    return section | {"releases": named} if named else section


def _strings(value: object) -> list[str]:
    """All strings among the values of nested settings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return []
    return [text for item in value for text in _strings(item)]
