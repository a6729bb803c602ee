"""Code as it stands in a card: in a block of its own, and what loads a checkpoint elsewhere.

Exporters put what they say of loading together from these.
"""

from __future__ import annotations

import json
import re
import shlex


def fenced(text: str, language: str) -> str:
    """A code block with a fence that the text does not hold."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def pretrained(name: str, kind: str) -> str:
    """Python that loads folder `name` with transformers' class `kind`."""
    path = json.dumps(name)
    lines = [
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f'model = {kind}.from_pretrained({path}, dtype="auto")',
        f"tokenizer = AutoTokenizer.from_pretrained({path})",
    ]
    return "\n".join(lines)


def served(name: str) -> list[str]:
    """Paragraphs that say how vLLM serves folder `name`."""
    return ["With vLLM:", fenced(f"vllm serve {shlex.quote(name)}", "sh")]
