"""A run or a sweep: compose the configuration, hand it over, show what came of it.

Exit status: 0 done (failures recorded under on_error=record too), 1 a run failed, 2 the
configuration or an input is wrong, 130 interrupted, 143 terminated. Imports no torch: help,
completion and stored results answer at once.
"""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config import options
from harness.config.command_line import again
from harness.config.errors import ConfigError
from harness.config.search_path import extend

if TYPE_CHECKING:
    from harness.parallel import Ranks

GROUPS = (
    "model",
    "data",
    "format",
    "transform",
    "solver",
    "tune",
    "eval",
    "export",
    "tracking",
    "recipe",
    "experiment",
    "sweeps",
)
MULTIRUN = {"-m", "--multirun", "hydra.mode=MULTIRUN"}


def job(cfg: DictConfig) -> None:
    """One run, or one job of a sweep.

    Neither raises what is no bug: Hydra would announce it, and other jobs would not run.
    """
    config = HydraConfig.instance().cfg
    assert isinstance(config, DictConfig)  # Hydra sets it before it calls this
    # Unresolved: what a word refers to is no part of the command.
    words = OmegaConf.to_container(config.hydra.overrides.task)
    assert isinstance(words, list)
    given = [str(word) for word in words]
    choices = {group: config.hydra.runtime.choices.get(group) for group in GROUPS}
    if config.hydra.mode == RunMode.MULTIRUN:
        job_of_sweep(cfg, config.hydra, choices, given)
        return
    refusal = through(cfg, config, choices, given)
    if refusal is not None:
        sys.exit(refuse(refusal))
    single_run(cfg, choices, given)


def single_run(cfg: DictConfig, choices: Mapping[str, str | None], given: list[str]) -> None:
    """Run, show the result, and leave by the exit status where that is not 0."""
    from harness.parallel import joined
    from harness.pipeline.job import execute
    from harness.report.table import run_table

    with joined(os.environ) as ranks:
        try:
            outcome = execute(cfg, choices, command=again(given), overrides=given, ranks=ranks)
        except Exception as error:
            sys.exit(failed(error, given, ranks))
        who = ranks.speaks(outcome.error) if outcome.error else None
    if not ranks.first:
        if who is not None:
            print(f"{who}{outcome.error}", file=sys.stderr)
        sys.exit(1 if outcome.status == "failed" and cfg.on_error == "raise" else 0)
    if outcome.stored:
        print("stored result (force=true computes again)", file=sys.stderr)
    run_table(outcome.metrics, outcome.run.path)
    if outcome.status == "failed":
        print(
            f"{outcome.error}\nThe traceback is in {outcome.run.path / 'status.json'}.",
            file=sys.stderr,
        )
        sys.exit(1 if cfg.on_error == "raise" else 0)


def job_of_sweep(
    cfg: DictConfig, setup: DictConfig, choices: Mapping[str, str | None], given: list[str]
) -> None:
    """Run, and leave a record of it for the sweep's table. setup: Hydra's own configuration."""
    from harness.parallel import joined
    from harness.pipeline.job import execute
    from harness.report.sweep import record, reporter
    from harness.report.sweep_table import summary

    sweep = Path(setup.sweep.dir)
    number = setup.job.num
    row: dict[str, object] = {"overrides": given}
    with joined(os.environ) as ranks:
        told = reporter(sweep, number) if ranks.first else None
        try:
            outcome = execute(cfg, choices, sweep.name, told, again(given), given, ranks)
            row |= summary(outcome.metrics) | {
                "stored": outcome.stored,
                "run_id": outcome.run.path.name,
                "error": outcome.error,
            }
        except Exception as error:
            row["status"] = "failed"
            row["error"] = reason(error, given) or f"{type(error).__name__}: {error}"
        if ranks.first:
            record(sweep, number, row)


def through(
    cfg: DictConfig, config: DictConfig, choices: Mapping[str, str | None], given: list[str]
) -> str | None:
    """Why this is no single run: an option that goes through several values. None: it is one."""
    from harness.report.sweep import swept

    settings = [
        key
        for key in swept(config, given)
        if key in GROUPS or OmegaConf.select(cfg, key, default=...) is not ...
    ]
    if not settings:
        return None
    option = next(
        f"{group}={choices[group]}" for group in ("sweeps", "experiment") if choices[group]
    )
    return f"{option} goes through {', '.join(settings)}: {again(['-m', *given])}"


def reason(error: BaseException, words: list[str]) -> str | None:
    """What to say of an error of the configuration, an input or the system; None for any other,
    which is a bug."""
    from harness.config.errors import DataError
    from harness.parallel import RankLost
    from harness.store import RunLocked

    if isinstance(error, ConfigError | DataError | RunLocked | RankLost):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        from harness.config.hints import explain

        return explain(error, words)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return None


def failed(error: Exception, words: list[str], ranks: "Ranks | None" = None) -> int:
    """Say why a command ended early, where no other rank does; the exit status for that."""
    from harness.parallel import ALONE, RankLost
    from harness.store import RunLocked

    ranks = ranks or ALONE
    cause = ranks.cause(error)
    who = ranks.speaks(f"{type(cause).__name__}: {cause}")
    message = reason(cause, words)
    if message is None:
        if who is not None:
            traceback.print_exception(cause)
        return 1
    status = 1 if isinstance(cause, RunLocked | RankLost) else 2
    return status if who is None else refuse(f"{who}{message}", status)


def refuse(message: str, status: int = 2) -> int:
    """Say in one line what is wrong; returns the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return status


def arranged(words: list[str]) -> list[str]:
    """Flags before overrides, as Hydra's parser wants them; a ~ that begins a value is the home
    folder, as shells have it."""
    words = [re.sub(r"(?<=[=,\[])~(?=/|$)", lambda _: str(Path.home()), word) for word in words]
    return sorted(
        words, key=lambda word: not word.startswith("-") and ("=" in word or word.startswith("~"))
    )


def terminated(*_) -> None:
    """What SIGTERM does: what an interrupt does, so that the store knows."""
    raise KeyboardInterrupt("terminated")


def run(words: list[str]) -> int:
    """The exit status of a command line."""
    source = options.checkout()
    if source is not None:  # for the processes of a sweep's jobs
        paths = [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ.setdefault("HARNESS_SWEEP", f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    # Hydra then raises instead of printing, and the message below is ours.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    signal.signal(signal.SIGTERM, terminated)
    words = arranged(words)
    overrides = [word for word in words if word not in MULTIRUN]
    try:
        if overrides != words:
            from harness.report.sweep import sweep

            flags = [word for word in overrides if word.startswith("-")]
            if flags:
                return refuse(f"{flags[0]}: not together with -m; leave one of them out")
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                return refuse(
                    "-m: the ranks of torchrun compute one run; start each job by its own"
                )
            return sweep(job, overrides)
        extend()
        sys.argv[1:] = words  # where Hydra reads them
        hydra.main(version_base="1.3", config_path=str(options.conf()), config_name="config")(job)()
    except KeyboardInterrupt as end:
        print(
            f"{end or 'interrupted'}; the same command goes on from the last finished block",
            file=sys.stderr,
        )
        return 143 if end.args else 130
    except ConfigError as error:
        return refuse(str(error))
    except ValueError as error:  # a group set to null, which Hydra does not expect
        return refuse(f"{' '.join(words)}: {error}")
    except Exception as error:
        return failed(error, words)
    return 0
