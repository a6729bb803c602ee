"""python -m harness.chat DIR: talk to a checkpoint, line by line, until the input ends.

A tokenizer with a chat template has the whole conversation put into it; any other has each line
continued as it stands. How tokens are drawn is the checkpoint's generation_config.json. Talked to
are checkpoints of export=harness, and what transformers loads: other layouts (of fp_quant on a GPU
that has its kernels) and models that are not quantized. A GGUF file is for llama.cpp.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.checkpoints.native_files import METHOD, RECORD
from harness.config.checks import device, integer
from harness.config.errors import ConfigError, DataError, reason
from harness.config.extras import need
from harness.config.paths import expanded
from harness.structure.facts import config_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 256  # the most of an answer


def main(words: Sequence[str]) -> int:
    """The exit status: 0 when the input has ended, 2 where there is nothing to talk to."""
    parser = ArgumentParser(prog="harness chat", description="Talk to a checkpoint.")
    parser.add_argument("folder", type=Path, help="an exported checkpoint")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="the most of an answer")
    parser.add_argument("--device", default="cpu", help="where it computes: cpu, cuda, cuda:1")
    asked = parser.parse_args(words)
    from harness.models.device import refuse_missing

    try:
        integer("--tokens", asked.tokens)
        refuse_missing("--device", device("--device", asked.device))
    except ConfigError as error:
        parser.error(str(error))
    try:
        model, tokenizer = _loaded(expanded(asked.folder), asked.device)
    except (DataError, ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"{asked.folder}: {reason(error)}.", file=sys.stderr)
        return 2
    talk(model, tokenizer, _typed(), asked.tokens)
    return 0


def talk(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lines: Iterable[str], tokens: int
) -> None:
    """Answer each line on standard output, a word at a time; empty lines are skipped."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    for line in lines:
        if not line.strip():
            continue
        asked: Any
        if tokenizer.chat_template:
            messages.append({"role": "user", "content": line})
            asked = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            asked = tokenizer(line, return_tensors="pt")
        # some tokenizers make more than a model takes
        inputs = {key: asked[key].to(model.device) for key in ("input_ids", "attention_mask")}
        given = inputs["input_ids"].shape[1]
        found = model.generate(  # pyright: ignore[reportCallIssue]
            **inputs, max_new_tokens=tokens, streamer=streamer
        )
        answer = tokenizer.decode(found[0, given:], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": str(answer)})


def _loaded(folder: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer

    from harness.checkpoints import native, online_reader
    from harness.structure.composite import model_class

    _refuse_gguf(folder)
    config = config_of(folder)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method == METHOD or (folder / RECORD).is_file():
        return native.load(folder, device)
    kind = model_class(config)
    who = f"harness chat of a {method} checkpoint"
    if method in (None, "compressed-tensors"):
        if method is not None:
            need("compressed_tensors", who)
        model = kind.from_pretrained(folder, dtype="auto")
        # its annotation, of a wrapped function, binds no self
        model = model.to(device)  # pyright: ignore[reportArgumentType]
    else:  # whose library may ask where the model is to be before it is loaded
        need("accelerate", who)
        model = kind.from_pretrained(folder, dtype="auto", device_map={"": device})
    online_reader.run(model, folder)
    return model, AutoTokenizer.from_pretrained(folder)


def _refuse_gguf(folder: Path) -> None:
    """Raise DataError for a folder whose weights are a GGUF file, and no others."""
    file = next(iter(sorted(folder.glob("*.gguf"))), None)
    if file is not None and not any(folder.glob("*.safetensors")):
        raise DataError(
            f"{file.name} is not loaded by transformers but by llama.cpp: llama-cli -m {file}."
        )


def _typed() -> Iterator[str]:
    """The lines of standard input, asked for where somebody sits before it."""
    marker = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(marker)
        except (EOFError, KeyboardInterrupt):
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
