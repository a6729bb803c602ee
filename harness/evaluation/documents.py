"""Zero-shot tasks as files of documents, one JSON object a line. A file holds one of

    {"query", "choices", "gold"}    which continuation is likeliest; acc by log-likelihood,
                                    acc_norm by that over its bytes
    {"context", "continuation"}     whether the continuation is what greedy decoding gives
                                    (LAMBADA), and its perplexity

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from harness.config.errors import DataError

CHOICE = ("query", "choices", "gold")
CONTINUATION = ("context", "continuation")


def read(path: Path) -> list[dict]:
    """The documents of a file, one a line that ends in \\n, with the keys of their kind alone.
    Raises DataError naming the line."""
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"eval.zeroshot: {path} is not UTF-8 ({error.reason} at byte {error.start}); "
            "convert it."
        ) from None
    rows = []
    # Not splitlines(): U+2028 and U+0085 are letters of a JSON string.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            rows.append(_document(line, f"{path} line {number}"))
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise DataError(f"eval.zeroshot: {path} is empty or mixes two kinds of documents.")
    return rows


def _document(line: str, place: str) -> dict:
    """The document of a line; place: what an error names."""
    try:
        row = json.loads(line)
    except ValueError:
        raise DataError(f"eval.zeroshot: {place} is not JSON.") from None
    if isinstance(row, dict) and _is_choice(row):
        return {key: row[key] for key in CHOICE}
    if isinstance(row, dict) and _is_continuation(row):
        return {key: row[key] for key in CONTINUATION}
    raise DataError(
        f"eval.zeroshot: {place} has neither query, choices (texts), gold (the index of one) nor "
        "context and continuation (texts)."
    )


def _is_choice(row: Mapping) -> bool:
    query, choices, gold = (row.get(key) for key in CHOICE)
    if not isinstance(choices, list) or type(gold) is not int:
        return False
    texts = all(isinstance(text, str) for text in [query, *choices])
    return texts and 0 <= gold < len(choices)


def _is_continuation(row: Mapping) -> bool:
    return all(isinstance(row.get(key), str) for key in CONTINUATION)
