"""A run from Python: the words of a command line in, its Outcome out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra import compose
from omegaconf import open_dict

from harness.command.run import GROUPS, arranged, reason, through
from harness.config.command_line import again
from harness.config.errors import ConfigError
from harness.config.search_path import composing

if TYPE_CHECKING:
    from harness.pipeline.job import Outcome


def call(words: Sequence[str]) -> Outcome:
    """What `harness WORDS` computes or finds done; one run, in this process.

    Raises ConfigError or DataError where the command says in a line what is wrong, RuntimeError
    where the run fails (under on_error=record its outcome says so).
    """
    given = arranged(list(words))
    try:
        with composing():
            cfg = compose("config", overrides=given, return_hydra_config=True)
    except Exception as error:
        message = reason(error, given)
        if message is None:
            raise
        raise ConfigError(message) from error
    choices = {group: cfg.hydra.runtime.choices.get(group) for group in GROUPS}
    refusal = through(cfg, cfg, choices, given)
    if refusal is not None:
        raise ConfigError(refusal)
    with open_dict(cfg):
        del cfg["hydra"]
    from harness.pipeline.job import execute

    outcome = execute(cfg, choices, command=again(given), overrides=given)
    if outcome.status == "failed" and cfg.on_error == "raise":
        raise RuntimeError(f"{outcome.error} ({outcome.run.path / 'status.json'})")
    return outcome
