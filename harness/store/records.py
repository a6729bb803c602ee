"""JSON records that prove themselves: a reader takes what does not fit its digest for absent.

    {
     "digest": "<SHA-256 of all that follows this line>",
     ...

A JSON file whose form is other tools' business keeps it; its digest stands in another record, and
`checked` reads it. A reader of records is given `damaged(path, why)`, and calls it for a file that
is there and is not right. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from harness.store.files import as_json, write

Damaged = Callable[[Path, str], None]
RECORD = re.compile(rb'\{\n "digest": "([0-9a-f]{64})",\n(.*)', re.DOTALL)
MISFIT = "its digest does not fit"


def quiet(path: Path, why: str) -> None:
    """A `damaged` that tells nobody."""


def sha256(content: bytes) -> str:
    """64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def write_record(path: Path, value: Mapping) -> None:
    """Replace `path` by a record of `value`, which has keys, but none called `digest`."""
    # of the text and not of the value, so that no reader has to write JSON the same way
    rest = as_json(dict(value)).removeprefix("{\n")
    write(path, f'{{\n "digest": "{sha256(rest.encode())}",\n{rest}')


def read_record(path: Path, damaged: Damaged = quiet) -> dict | None:
    """What `write_record` was given, or None where there is no such file or it is damaged."""
    content = _content(path, damaged)
    if content is None:
        return None
    record = RECORD.fullmatch(content)
    if record is None or sha256(record[2]) != record[1].decode():
        damaged(path, "it holds no digest" if record is None else MISFIT)
        return None
    return json.loads(b"{" + record[2])


def write_checked(path: Path, value) -> str:
    """Replace `path` by plain JSON; returns the digest to be kept elsewhere."""
    content = as_json(value)
    write(path, content)
    return sha256(content.encode())


def checked(path: Path, digest: str | None, damaged: Damaged = quiet):
    """The value in a file of `write_checked`, or None where there is none or it is damaged.

    digest: None where none was taken; then whatever is JSON is taken as it is.
    """
    content = _content(path, damaged)
    if content is None:
        return None
    if digest is not None and sha256(content) != digest:
        damaged(path, MISFIT)
        return None
    try:
        return json.loads(content)
    except ValueError:
        damaged(path, "it is no JSON")
        return None


def _content(path: Path, damaged: Damaged) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        damaged(path, f"it cannot be read: {error.strerror}")
        return None
