"""What an engine's own model of an architecture computes as transformers' does.

An engine that takes our linears into its model (engines/served.py) computes all else itself.
"""

from __future__ import annotations

from harness.formats import KVCache

FAMILIES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")  # each compared in a test


def refusal(family: object, kv: KVCache | None) -> str | None:
    """Why an engine would not compute what is evaluated here, None where it does.

    family: the config's model_type; kv: the format of keys and values.
    """
    if family not in FAMILIES:
        return (
            f"model_type={family}: only layers of {', '.join(FAMILIES)} were found to be the same "
            "in an engine; evaluate this model here (model=checkpoint)"
        )
    if kv is not None and kv.window:
        return (
            f"format.kv.window={kv.window}: an engine's cache keeps a key as it was written, and "
            "here it is quantized when it has grown old; set format.kv.window=0"
        )
    return None
