"""Windows: a text tokenized once, then cut into pieces of equal length.

Tokenizing once and cutting afterwards is the convention of the perplexity literature:
a BOS stands at most once, at the very start, and none where a window begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from harness.config.errors import ConfigError, DataError

if TYPE_CHECKING:  # planning imports this, and should not wait for it
    from transformers import PreTrainedTokenizerBase

ORDERS = ("first", "random")


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str | Sequence[str]) -> torch.Tensor:
    """Token ids of a text, int64 `[N]`, with the tokenizer's own defaults for special tokens.

    A list of samples is packed: each sample is tokenized by itself and they are joined in order,
    with the tokenizer's end-of-text token between them where it has one. Samples shorter than a
    window therefore share one, longer ones run over several.
    """
    if isinstance(text, str):
        return torch.tensor(_ids(tokenizer, text), dtype=torch.long)
    packed = []
    for sample in text:
        if packed and tokenizer.eos_token_id is not None:
            packed.append(tokenizer.eos_token_id)
        packed += _ids(tokenizer, sample)
    return torch.tensor(packed, dtype=torch.long)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a whole corpus is meant to be longer than the model's context
    return tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]


def refuse_unknown_ids(name: str, tokens: torch.Tensor, rows: int) -> None:
    """Raise DataError where a text's token ids [N] reach beyond an embedding of so many rows."""
    if len(tokens) and int(tokens.max()) >= rows:
        raise DataError(
            f"text {name}: the tokenizer makes token {int(tokens.max())} of it, "
            f"and the model's embedding has {rows} rows; "
            "tokenizer and weights are of different models"
        )


def windows(
    tokens: torch.Tensor,
    length: int,
    count: int | None,
    order: str = "first",
    seed: int = 0,
    field: str = "data.calibration",
) -> torch.Tensor:
    """Cut `tokens`, int64 `[N]`, into windows, int64 `[count, length]`.

    order: first (the first `count` windows side by side, without overlap) | random (windows at
        random places of the text, which may overlap, drawn from a generator seeded with `seed`).
    count: None takes floor(N / length), and the tail is dropped.
    field: the settings group that error messages name.

    Raises ConfigError for a length, count or order that makes no sense, DataError where the text is
    too short.
    """
    if order not in ORDERS:
        raise ConfigError(f"{field}.order={order}: choose one of {', '.join(ORDERS)}")
    for name, value in (("length", length), ("windows", count)):
        if name == "windows" and value is None:
            continue
        if type(value) is not int or value < 1:
            raise ConfigError(f"{field}.{name}={value} must be a positive whole number")
    whole = len(tokens) // length
    if count is None:
        count = max(whole, 1)
    needed = count if order == "first" else 1  # random windows may overlap
    if whole < needed:
        raise DataError(
            f"{field}.windows={count} of {field}.length={length} tokens need {count * length} "
            f"tokens, the text has only {len(tokens)}; lower {field}.windows or {field}.length, "
            "or give a longer text"
        )
    if order == "first":
        return tokens[: count * length].view(count, length)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
    return tokens[starts + torch.arange(length)]
