"""Quantize a language model with any method x format, and measure what it cost.

Importing it lets transformers load checkpoints of `export=harness` as it loads its own:

    import harness
    model = AutoModelForCausalLM.from_pretrained(folder)
"""

from importlib import import_module


def load(path, device="cpu", dtype=None, packed=False):
    """(model, tokenizer) of a checkpoint of `export=harness`: see harness/checkpoints/native.py."""
    native, saved = (import_module(f"harness.checkpoints.{name}") for name in ("native", "saved"))
    model, tokenizer = native.load(path, device, dtype, packed)
    saved.keep(model, path)
    return model, tokenizer


def run(*words):
    """What the command `harness WORDS` computes, or finds done: see harness/command/call.py.

    outcome = harness.run("format=nvfp4", "solver=gptq"); outcome.metrics, outcome.run.path
    """
    return import_module("harness.command.call").call(words)


# by name: the package itself imports no room, and no library before it is used
import_module("harness.libraries.arrival").after(
    "transformers.quantizers", "harness.checkpoints.pretrained"
)
