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
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.config.errors import ConfigError, DataError
from harness.lm_eval.tasks import write_tasks


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    from lm_eval.__main__ import cli_evaluate

    import_module("harness.lm_eval.model")  # registers itself
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data_path")
    parser.add_argument("--include_path")
    ours, rest = parser.parse_known_args(words)
    before = sys.argv
    with TemporaryDirectory() as folder:
        try:
            if ours.include_path is None:
                write_tasks(ours.data_path, Path(folder))
                ours.include_path = folder
            elif ours.data_path is not None:
                raise ConfigError("--data_path and --include_path: give one of them.")
            tasks = ["--include_path", ours.include_path] if "--tasks" in rest else []
            sys.argv = ["lm_eval", *rest, *tasks]
            cli_evaluate()
        except (ConfigError, DataError) as error:
            print(error, file=sys.stderr)
            return 2
        finally:
            sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
