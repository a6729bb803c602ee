"""Windows: a text tokenized once, then cut into pieces of equal length.

Tokenizing once and cutting afterwards is the convention of the perplexity literature:
a BOS stands at most once, at the very start, and none where a window begins. Models that were
trained with one before every text may need it in every window (Gemma); `data.bos` says so, or the
model is asked: it needs one where its loss is lower by more than NEEDED with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from harness.config.checks import integer, one_of
from harness.config.errors import DataError
from harness.parallel import ALONE, Ranks

if TYPE_CHECKING:  # planning imports this, and should not wait for it
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ORDERS = ("first", "random")
NEEDED = 0.1  # nats a token; Gemma 3 needs .4 to .5, Llama-like models gain or lose hundredths


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
    bos: int | None = None,
) -> torch.Tensor:
    """Cut `tokens`, int64 `[N]`, into windows, int64 `[count, length]`.

    bos: a token that stands at the beginning of each window, and counts in its length.

    order: first (the first `count` windows side by side, without overlap) | random (windows at
        random places of the text, which may overlap, drawn from a generator seeded with `seed`).
    count: None takes floor(N / length), and the tail is dropped.
    field: the settings group that error messages name.

    Raises ConfigError for a length, count or order that makes no sense, DataError where the text is
    too short.
    """
    one_of(f"{field}.order", order, ORDERS)
    integer(f"{field}.length", length)
    integer(f"{field}.windows", count, optional=True)
    step = length
    if bos is not None:
        tokens = without(tokens, bos)
        step = max(length - 1, 1)
    whole = len(tokens) // step
    if count is None:
        count = max(whole, 1)
    needed = count if order == "first" else 1  # random windows may overlap
    if whole < needed:
        raise DataError(
            f"{field}.windows={count} of {field}.length={length} tokens need {count * step} "
            f"tokens, the text has only {len(tokens)}; lower {field}.windows or {field}.length, "
            "or give a longer text"
        )
    if order == "first":
        cut = tokens[: count * step].view(count, step)
    else:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(tokens) - step + 1, (count, 1), generator=generator)
        cut = tokens[starts + torch.arange(step)]
    return cut if bos is None else torch.cat([cut.new_full((count, 1), bos), cut], dim=1)


def in_turn(texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Windows of k texts, `[N_i, L]` each, one of each text in turn, `[N, L]`.

    The n-th is window n // k of text n mod k, until that text has no more: shares are equal, one
    window apart at most, and any first windows are a mixture, too.
    """
    count = min(len(cut) * len(texts) + place for place, cut in enumerate(texts))
    return torch.stack([texts[n % len(texts)][n // len(texts)] for n in range(count)])


def without(tokens: torch.Tensor, bos: int | None) -> torch.Tensor:
    """Tokens `[N]` less a BOS at their start."""
    return tokens[1:] if len(tokens) and int(tokens[0]) == bos else tokens


@torch.no_grad()
def bos_gain(model: PreTrainedModel, tokens: torch.Tensor, bos: int, ranks: Ranks = ALONE) -> float:
    """By how many nats a token a model's loss is lower with a BOS before it.

    tokens: one window `[L]` of text; ranks: each reads its share, of it without and with a BOS.
    """
    text = without(tokens, bos).to(model.get_input_embeddings().get_parameter("weight").device)
    started = torch.cat([text.new_tensor([bos]), text])
    losses = []
    for ids, skip in ranks.share(((text, 0), (started, 1))):
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
        targets = ids[skip + 1 :]
        losses.append(torch.nn.functional.cross_entropy(logits[skip:-1], targets))
    without_bos, with_bos = ranks.merged(losses)
    return float(without_bos - with_bos)
