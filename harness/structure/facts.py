"""The config of a model as transformers fills it in, its sizes checked.

A config.json leaves to transformers what has a default (Qwen3's head_dim, the kinds of layers of an
older file), so that the raw file would say something else than the model does. Reads no weights and
imports no torch of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from harness.config.errors import DataError, reason

CONFIG = "config.json"
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
)
OPTIONAL_SIZES = (
    "intermediate_size",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def config_of(folder: Path, **origin):
    """transformers' config of a folder with a config.json.

    origin: further arguments of from_pretrained. Raises DataError that names the file, and the key
    where one is at fault.
    """
    from transformers import AutoConfig

    path = folder / CONFIG
    raw = read_object(path)
    if not isinstance(raw.get("model_type"), str):
        raise DataError(
            f"{path}: model_type={raw.get('model_type')}: names no architecture; give a folder "
            "saved by save_pretrained."
        )
    refuse_sizes(str(path), raw)
    try:
        return AutoConfig.from_pretrained(folder, **origin)
    except Exception as error:  # each release validates by other classes
        raise DataError(
            f"{path} cannot be read as the config of a {raw['model_type']}: {reason(error)}."
        ) from None


def facts_of(config, where: str) -> dict:
    """A transformers config as plain values.

    Raises DataError, beginning with `where`, for a size that is none.
    """
    fields = config.to_dict()
    refuse_sizes(where, fields)
    return fields


def refuse_sizes(where: str, config: Mapping) -> None:
    """Raise DataError for a size of the text decoder that is there and no positive whole number.

    Heads that do not divide among the key/value heads are refused too.
    """
    for key in (*SIZES, *OPTIONAL_SIZES):
        # a key that is not there is left to transformers, which has a default for it
        if key not in config:
            continue
        value = config[key]
        if value is None and key in OPTIONAL_SIZES:
            continue
        # some architectures have one for each layer
        values = value if isinstance(value, list) and key == "intermediate_size" else [value]
        # JSON's true is an int of Python's, and no size
        if not values or any(type(each) is not int or each <= 0 for each in values):
            raise DataError(f"{where}: {key}={value}: needs a whole number of at least 1.")
    heads = config.get("num_attention_heads")
    groups = config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise DataError(
            f"{where}: num_attention_heads={heads} is no multiple of num_key_value_heads={groups}."
        )
    if text_of(config) is not config:
        refuse_sizes(f"{where}: text_config", text_of(config))


def text_of(config: Mapping) -> Mapping:
    """What the fields of a config say of the text decoder, where they say more than that."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def read_object(path: Path) -> dict:
    """The JSON object in a file.

    Raises DataError naming it where it is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path.parent} lacks {path.name}; copy it again, or give a folder saved by "
            "save_pretrained."
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path} is damaged, not JSON ({reason(error)}); copy it again.") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds {type(content).__name__}, and needs an object; copy it again."
        )
    return content
