"""A tokenizer as llama.cpp reads it: tokens, what kind each is, merges, and how text is split.

A file names the rule by which text is split before merging, and llama.cpp has each in its code.
The name follows from the rule of the evaluated tokenizer; `export.pre` names another one. Held are
byte-level BPE tokenizers (GPT-2's kind). Source: llama.cpp, src/llama-vocab.cpp and conversion/.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gguf import GGUFWriter, TokenType

from harness.config.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {WORDS + r"\p{N}{1,3}" + REST: "llama-bpe", WORDS + r"\p{N}" + REST: "qwen2"}
SPECIAL = ("bos", "eos", "unk", "pad")


def add_vocabulary(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int, pre: str | None = None
) -> None:
    """Write a tokenizer into a file of a model with `size` embeddings.

    pre: the rule's name; None: that of the tokenizer's own. Raises what `byte_level` raises.
    """
    content, pre = byte_level(tokenizer, pre)
    model = content["model"]
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([_kind(index, names, added) for index in range(size)])
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    # an empty list cannot be written and its lack is refused; what makes no token merges nothing
    writer.add_token_merges(merges or [" ".join(names[index] for index in sorted(names)[:2])])
    for name in SPECIAL:
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(first == [tokenizer.bos_token_id])
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def byte_level(tokenizer: PreTrainedTokenizerBase, pre: str | None = None) -> tuple[dict, str]:
    """(what tokenizer.json says, llama.cpp's name of how it splits text); pre: the name, if given.

    Raises DataError where it is no byte-level BPE, or its rule is none that has a name here.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if fast is None else json.loads(fast.to_str())
    model = content.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise DataError(
            f"export=gguf with a tokenizer of {model.get('type')}: it writes byte-level BPE alone; "
            "use export=dequantized, which llama.cpp's converter reads."
        )
    return content, pre or rule(content["pre_tokenizer"])


def rule(pre_tokenizer: Mapping | None) -> str:
    """llama.cpp's name of a pre-tokenizer, given as tokenizer.json has it.

    Raises DataError, with a way out, for one that has none here.
    """
    parts = [] if pre_tokenizer is None else [pre_tokenizer]
    if pre_tokenizer is not None and pre_tokenizer["type"] == "Sequence":
        parts = pre_tokenizer["pretokenizers"]
    match parts:
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
            {"type": "ByteLevel", "use_regex": False},
        ] if pattern in PATTERNS:
            return PATTERNS[pattern]
    raise DataError(
        "export=gguf: llama.cpp's name for how the tokenizer splits text is not known "
        f"({json.dumps(pre_tokenizer)[:200]}); set export.pre to it, as its llama-vocab.cpp has it."
    )


def _kind(index: int, names: Mapping[int, str], added: Mapping[int, bool]) -> TokenType:
    """What a token is: of the text, a mark, or an embedding that no text has."""
    if index not in names:
        return TokenType.UNUSED
    if index not in added:
        return TokenType.NORMAL
    return TokenType.CONTROL if added[index] else TokenType.USER_DEFINED
