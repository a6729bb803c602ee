"""The texts of a run as its settings name them: corpora, and the windows that are cut of them, long
enough and apart from one another.

Imports no torch; calibration/windows.py cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from harness.calibration.corpus import Corpus, TextFolder
from harness.calibration.samples import Samples
from harness.config.build import build, option
from harness.config.checks import integer, one_of
from harness.config.errors import ConfigError, DataError

MIXED = "data.calibration.corpora"


@dataclass(frozen=True)
class Windows:
    """`count` windows of `length` tokens (count None: all of the text), in this `order`."""

    count: int | None
    length: int
    order: str = "first"

    def within(self, tokens: int) -> Windows:
        """Those of a text of so many tokens: where all of it is taken, it may be one shorter window
        (of two tokens at least, so that there is one to predict)."""
        if self.count is not None:
            return self
        return replace(self, length=max(2, min(self.length, tokens)))

    def shares(self, texts: int) -> list[Windows]:
        """Those of each of so many texts that give them in turn."""
        if self.count is None:
            return [self] * texts
        counts = (len(range(place, self.count, texts)) for place in range(texts))
        return [replace(self, count=count) for count in counts]


def windows_of(field: str, section: Mapping) -> Windows:
    """From the settings under `field`. Raises ConfigError."""
    count = integer(f"{field}.windows", section["windows"], optional=True)
    length = integer(f"{field}.length", section["length"], low=2)
    assert length is not None  # only what is optional may be
    order = one_of(f"{field}.order", section.get("order", "first"), ("first", "random"))
    return Windows(count, length, order)


def evaluated(names: Sequence[str], data: Corpus) -> tuple[Corpus, ...]:
    """The corpora of these names, each text once; data: the run's own, called `data` there."""
    if not names:
        raise ConfigError(
            "eval.perplexity.corpora=[]: needs at least one corpus, e.g. [data, pydoc]."
        )
    corpora: dict[str, Corpus] = {}
    for name in names:
        corpus = data if name == "data" else _other("eval.perplexity.corpora", name, "evaluation")
        mark = corpus.fingerprint("evaluation")
        if any(other.name == corpus.name and key != mark for key, other in corpora.items()):
            raise ConfigError(
                f"eval.perplexity.corpora: two different texts are called {corpus.name}; "
                "set data.name to another."
            )
        corpora.setdefault(mark, corpus)  # under the first of its names
    return tuple(corpora.values())


def calibrating(section: Mapping, windows: Windows, data: Corpus) -> tuple[Corpus, ...]:
    """The corpora that calibrate in equal shares, by the section data.calibration.

    data: the run's own, called `data` there; a text of one's own (`path`) takes its place. Raises
    ConfigError, DataError.
    """
    path = section["path"]
    own = data if path is None else Samples(path)
    names = section["corpora"]
    if names is None:
        return (own,)
    if not names:
        raise ConfigError(f"{MIXED}=[]: needs at least one corpus, e.g. [data, stdlib], or null.")
    if path is not None and "data" not in names:
        raise ConfigError(
            f"data.calibration.path={path} with {MIXED}={names}: it stands for `data`, which is "
            "not among them; name it there, or set data.calibration.path=null."
        )
    corpora: dict[str, Corpus] = {}
    for name in names:
        corpus = own if name == "data" else _other(MIXED, name, "calibration")
        mark = corpus.fingerprint("calibration")
        if mark in corpora:
            raise ConfigError(
                f"{MIXED}={names}: {name} is the text that {corpora[mark].name} is, and shares are "
                "equal; name it once."
            )
        if any(other.name == corpus.name for other in corpora.values()):
            raise ConfigError(
                f"{MIXED}: two different texts are called {corpus.name}; set data.name to another."
            )
        corpora[mark] = corpus
    if windows.count is not None and windows.count < len(corpora):
        raise ConfigError(
            f"data.calibration.windows={windows.count} with {MIXED}={names}: needs a window of "
            "each at least; raise the first, or name fewer."
        )
    return tuple(corpora.values())


def names_of(texts: Sequence[Corpus], corpora: Sequence[Corpus]) -> tuple[str, ...]:
    """Names of texts that calibrate: that of an evaluated corpus where it is the same text, whoever
    named it."""
    known = {
        corpus.fingerprint("calibration"): corpus.name
        for corpus in reversed(corpora)
        if not isinstance(corpus, Samples)
    }
    return tuple(known.get(text.fingerprint("calibration"), text.name) for text in texts)


@contextmanager
def sharing(corpus: Corpus, corpora: Sequence[Corpus]) -> Iterator[None]:
    """Says whose share it is that a text is too short for, where it is one of several."""
    try:
        yield
    except DataError as error:
        if len(corpora) == 1:
            raise
        raise DataError(f"{MIXED}: the share of {corpus.name}: {error}") from None


def check_texts(
    texts: Sequence[Corpus], calibration: Windows, corpora: Sequence[Corpus], evaluation: Windows
) -> None:
    """Refuse texts too short for their windows (DataError), and one that calibrates and is
    evaluated (ConfigError).

    texts: those that calibrate, in equal shares; corpora: those that are evaluated.
    """
    for corpus in corpora:
        _check_length("eval.perplexity", evaluation, corpus.text("evaluation"))
    if calibration.count is not None:
        for corpus, share in zip(texts, calibration.shares(len(texts))):
            with sharing(corpus, texts):
                _check_length("data.calibration", share, corpus.text("calibration"))
    # By what it says: a file may hold what an evaluated corpus has under another name.
    tested = {corpus.fingerprint("evaluation") for corpus in corpora}
    for corpus in texts:
        if corpus.fingerprint("calibration") in tested:
            field = "data.calibration.path" if isinstance(corpus, Samples) else "data"
            name = corpus.path if isinstance(corpus, Samples) else corpus.name
            raise ConfigError(
                f"{field}={name} calibrates with the text that is evaluated; calibrate on "
                "another one."
            )


def _check_length(field: str, windows: Windows, text: str | list[str]) -> None:
    """Refuse a text with fewer bytes than tokens asked for; the exact count needs the tokenizer and
    comes later."""
    parts = [text] if isinstance(text, str) else text
    available = sum(len(part.encode()) for part in parts)
    # A token takes a byte of the text at least.
    needed = windows.length * (windows.count or 1)
    if available < needed:
        raise DataError(
            f"{field}.windows={windows.count} of {field}.length={windows.length} tokens need "
            f"{needed} tokens, the text has {available} bytes; "
            "lower one of them, or give a longer text."
        )


def _other(field: str, name: str, part: str) -> Corpus:
    """A corpus by the name of a data option, or by its folder; it has that part."""
    try:
        corpus = TextFolder(name) if "/" in name else corpus_of(option("data", name))
        corpus.fingerprint(part)  # raises where there is no such text
        return corpus
    except (ConfigError, DataError) as error:
        raise type(error)(f"{field}={name}: {error}") from None


def corpus_of(data: Mapping) -> Corpus:
    """From the section `data`. Raises ConfigError."""
    section = {key: x for key, x in data.items() if key not in ("calibration", "beside", "bos")}
    return build(section, "data", Corpus)
