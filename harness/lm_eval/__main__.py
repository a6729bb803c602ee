"""python -m harness.lm_eval WORDS: lm-eval's command, which then knows `--model harness`.

lm-eval finds models in a table of its own, and has no entry point for others': whoever registers
one must be imported first, and that is all this does. Every word is lm-eval's but one:

    --data_path DIR   the .jsonl files of eval.zeroshot.data_path, as tasks of their names, besides
                      (and before) its own

    python -m harness.lm_eval --model harness --model_args pretrained=DIR --tasks agreement
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from harness.config.errors import ConfigError, DataError
from harness.config.extras import need
from harness.lm_eval.tasks import write_tasks


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    before = sys.argv
    with TemporaryDirectory() as folder:
        try:
            for library in ("lm_eval", "datasets", "accelerate"):
                need(library, "harness lm_eval", extra="zeroshot")
            sys.argv = ["lm_eval", *arranged(words, Path(folder))]
            import_module("harness.lm_eval.model")  # registers itself
            import_module("lm_eval.__main__").cli_evaluate()
        except (ConfigError, DataError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        finally:
            sys.argv = before
    return 0


def arranged(words: Sequence[str], folder: Path) -> list[str]:
    """The words as lm-eval takes them, with our tasks in the folder where any task is asked for.

    Raises ConfigError for a --data_path where lm-eval is given another folder of tasks, of which it
    takes one; DataError as `write_tasks` does.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data_path")
    ours, rest = parser.parse_known_args(words)
    tasks, include_path = _asked(rest)
    if include_path is not None and ours.data_path is not None:
        raise ConfigError("--data_path and --include_path: give one of them.")
    if include_path is not None or (tasks is None and ours.data_path is None):
        return rest
    write_tasks(ours.data_path, folder)
    return [*rest, "--include_path", str(folder)]


def _asked(words: Sequence[str]) -> tuple[object, object]:
    """(tasks, include_path) as lm-eval reads them, from words and from the file of settings among
    them; None for what is not there."""
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--tasks", "-t", nargs="+")
    parser.add_argument("--include_path")
    parser.add_argument("--config", "-C", type=Path)
    asked, _ = parser.parse_known_args(words)
    held = None
    with suppress(OSError, ValueError, yaml.YAMLError):  # lm-eval says what is wrong with it
        if asked.config is not None:
            held = yaml.safe_load(asked.config.read_text(encoding="utf-8"))
    if not isinstance(held, dict):
        held = {}
    return asked.tasks or held.get("tasks"), asked.include_path or held.get("include_path")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
