"""Corpora: a text to calibrate on and another to evaluate on, never the same one.

Texts that need no network and no file are in shipped.py; one of them is the default. A file that
only calibrates is in samples.py. Hub data sets are read through the `datasets` library. Nothing
here imports torch, transformers or datasets before it has to: a finished run is found by its
fingerprint in a process that must answer at once.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config.checks import integer, typed
from harness.config.errors import ConfigError, DataError, reason
from harness.config.extras import need
from harness.config.paths import expanded
from harness.libraries import hub
from harness.libraries.datasets import cached_builder, offline

if TYPE_CHECKING:
    from datasets import DatasetBuilder

PARTS = ("calibration", "evaluation")


class Corpus(ABC):
    """A text in two parts, "calibration" and "evaluation"."""

    name: str  # in the result tables

    @abstractmethod
    def check(self) -> None:
        """Raise ConfigError or DataError where the text is not there, or blank. Cheap."""

    @abstractmethod
    def text(self, part: str) -> str | list[str]:
        """The text of a part, in samples where it comes in samples."""

    def fingerprint(self, part: str) -> str:
        """What a stored result is keyed by: a hash of that part's text, whatever it is called.

        Another text under the same name so never replays a stored number.
        """
        return hashlib.sha256(json.dumps(self.text(part)).encode()).hexdigest()[:16]


class TextFolder(Corpus):
    """A folder with `train.txt`, `valid.txt`, `test.txt`, each read whole and unmodified (UTF-8).

    `train.txt` calibrates, or `valid.txt` where there is none; `test.txt` evaluates.
    """

    def __init__(self, path: str | None, name: str | None = None):
        typed("data.", {"path": path}, {"path": str | None})
        self.path = None if path is None else expanded(path)
        self.name = name or ("text" if self.path is None else self.path.absolute().name)

    def check(self) -> None:
        for part in PARTS:
            refuse_blank(self._file(part), "data.path")

    def text(self, part: str) -> str:
        return read(self._file(part), "data.path")

    def _file(self, part: str) -> Path:
        if self.path is None:
            raise ConfigError(
                "data=text needs data.path=DIR, a folder with train.txt (or valid.txt) and test.txt"
            )
        if not self.path.is_dir():
            raise DataError(
                f"data.path={self.path} is not a folder; "
                "give one with train.txt (or valid.txt) and test.txt"
            )
        names = (("train.txt", "valid.txt"), ("test.txt",))[_index(part)]
        for name in names:
            if (self.path / name).is_file():
                return self.path / name
        raise DataError(
            f"data.path={self.path} holds no {' or '.join(names)}, which {part} needs; "
            "put one there"
        )


class HubText(Corpus):
    """A text data set of the Hugging Face hub: the texts of its rows joined by blank lines.

    `calibration_split` calibrates, `evaluation_split` evaluates; null where a set has one split
    only, whose first `documents` rows calibrate and the next evaluate.

    With `documents` only the first so many rows of each split are streamed, for sets too large to
    download. A set that was downloaded before is read from the local cache without asking the hub.
    columns: what of a row is text, in this order; a conversation is what is said in it, without
    the marks of any model's chat template.

    Raises DataError where the hub cannot be reached and the set is not in the cache.
    """

    def __init__(
        self,
        dataset: str,
        config: str,
        evaluation_split: str | None,
        *,
        calibration_split: str = "train",
        columns: Sequence[str] = ("text",),
        revision: str | None = None,
        documents: int | None = None,
        name: str | None = None,
    ):
        names = {"dataset": dataset, "config": config, "calibration_split": calibration_split}
        if evaluation_split is not None:
            names["evaluation_split"] = evaluation_split
        typed("data.", names, dict.fromkeys(names, str))
        if not columns:
            raise ConfigError("data.columns=[]: needs the name of a column, e.g. [text]")
        integer("data.documents", documents, optional=True)
        if documents is None and evaluation_split is None:
            raise ConfigError(
                "data.documents=null with data.evaluation_split=null: the first documents "
                "calibrate and the next evaluate; say how many, or name a split that evaluates"
            )
        self.dataset = dataset
        self.config = config
        self.splits = (calibration_split, evaluation_split or calibration_split)
        self.columns = tuple(columns)
        self.revision = revision
        self.documents = documents
        # rows of each split that are the other part's
        self.skipped = (0, 0 if evaluation_split is not None else documents or 0)
        self.name = name or dataset.split("/")[-1]

    def check(self) -> None:
        need("datasets", f"data={self.name}")
        from huggingface_hub import HfApi

        if self._cached() is None:
            try:
                self._refuse_offline()
                HfApi().dataset_info(self.dataset, revision=self.revision, timeout=hub.TIMEOUT)
            except Exception as error:  # of the hub's HTTP library, which has changed over time
                raise self._unreachable(error) from error

    def text(self, part: str) -> str:
        start, stop = self._range(part)
        try:
            rows = [*islice(self._rows(self.splits[_index(part)]), start, stop)]
        except Exception as error:  # as in `check`
            raise self._unreachable(error) from error
        return "\n\n".join(self._written(row) for row in rows)

    def fingerprint(self, part: str) -> str:
        # the set and its revision, not the text: a finished run is found without asking the hub
        start, stop = self._range(part)
        rows = "" if stop is None else f"[{start or ''}:{stop}]"
        columns = "" if self.columns == ("text",) else f"/{'+'.join(self.columns)}"
        split = self.splits[_index(part)]
        return f"{self.dataset}/{self.config}@{self.revision or 'main'}/{split}{rows}{columns}"

    def _range(self, part: str) -> tuple[int, int | None]:
        """The rows of its split that a part takes."""
        start = self.skipped[_index(part)]
        return start, None if self.documents is None else start + self.documents

    def _written(self, row: Mapping) -> str:
        """The text of a row. Raises DataError where a column is not there."""
        texts: list[str] = []
        for column in self.columns:
            held = row.get(column)
            if not isinstance(held, str | list):
                raise DataError(
                    f"data={self.name}: a row of {self.dataset} has no text in its column "
                    f"{column}; it has {', '.join(row)}"
                )
            if isinstance(held, str):
                texts.append(held)
            else:  # turns, of which some sets say `from` and `value`
                texts += [turn["content"] if "content" in turn else turn["value"] for turn in held]
        return "\n\n".join(text for text in texts if text or len(self.columns) == 1)

    def _rows(self, split: str) -> Iterable:
        """The rows of a split, from the cache or the hub."""
        from datasets import load_dataset

        cached = self._cached()
        if cached is not None:
            return cached.as_dataset(split=split)
        self._refuse_offline()
        streaming = self.documents is not None
        return load_dataset(
            self.dataset, self.config, split=split, revision=self.revision, streaming=streaming
        )

    def _cached(self) -> DatasetBuilder | None:
        """The `datasets` cache's own builder of the set, or None.

        A named revision is always asked of the hub.
        """
        if self.revision is not None:
            return None
        return cached_builder(self.dataset, self.config)

    def _refuse_offline(self) -> None:
        if offline():
            raise ConnectionError("HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set")

    def _unreachable(self, error: Exception) -> DataError:
        return DataError(
            f"data={self.name}: cannot read {self.dataset} ({self.config}) from the hub: "
            f"{reason(error)}. "
            "Without the hub use data=pydoc, or data=text data.path=DIR with local files"
        )


def _index(part: str) -> int:
    """0 for the calibration part, 1 for the evaluation part."""
    if part not in PARTS:
        raise ValueError(f"part is one of {PARTS}, not {part!r}")
    return PARTS.index(part)


def read(path: Path, field: str) -> str:
    """The text of a file, as it is. field: what names the file in the DataError of no UTF-8."""
    try:
        # by bytes: a text file's own line ends are part of what is tokenized
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{field}: {path} is not UTF-8 ({error.reason} at byte {error.start}); convert it"
        ) from error


def refuse_blank(path: Path, field: str) -> None:
    """Raise DataError, which names the field, where a file holds white space alone."""
    with path.open("rb") as file:
        if not any(line.strip() for line in file):
            raise DataError(f"{field}: {path} holds no text; give a file with some")
