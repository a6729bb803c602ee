"""The command line: compose the configuration, hand it over, turn the outcome into a table and an exit status.

Exit status: 0 done (failures recorded under on_error=record too), 1 a run failed, 2 the configuration or an input is wrong,
130 interrupted, 143 terminated. Imports no torch: help, completion and stored results answer at once.
"""

import os
import re
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parent
GROUPS = (
    "model",
    "data",
    "format",
    "transform",
    "solver",
    "eval",
    "export",
    "tracking",
    "experiment",
    "sweeps",
)
MULTIRUN = {"-m", "--multirun", "hydra.mode=MULTIRUN"}


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(cfg) -> None:
    """One run, or one job of a sweep; neither raises what is no bug: Hydra would announce it, and other jobs would not run."""
    from harness.pipeline.job import execute
    from harness.report.sweep import record, reporter, swept
    from harness.report.sweep_table import summary
    from harness.report.table import run_table

    config = HydraConfig.instance().cfg
    hydra_cfg, given = config.hydra, OmegaConf.to_container(config.hydra.overrides.task)
    choices = {group: hydra_cfg.runtime.choices.get(group) for group in GROUPS}
    command = shlex.join(["python", "run.py", *given])
    if hydra_cfg.mode != RunMode.MULTIRUN:
        left = [
            key
            for key in swept(config, given)
            if key in GROUPS or OmegaConf.select(cfg, key, default=...) is not ...
        ]
        if left:
            name = next(
                f"{group}={choices[group]}" for group in ("sweeps", "experiment") if choices[group]
            )
            sys.exit(
                refuse(
                    f"{name} goes through {', '.join(left)}: python run.py -m {shlex.join(given)}"
                )
            )
        try:
            outcome = execute(cfg, choices, command=command, overrides=given)
        except Exception as error:
            sys.exit(failed(error, given))
        if outcome.stored:
            print("stored result (force=true computes again)", file=sys.stderr)
        run_table(outcome.metrics, outcome.run.path)
        if outcome.status == "failed":
            print(
                f"{outcome.error}\nThe traceback is in {outcome.run.path / 'status.json'}.",
                file=sys.stderr,
            )
            sys.exit(1 if cfg.on_error == "raise" else 0)
        return
    sweep, row = Path(hydra_cfg.sweep.dir), {"overrides": given}
    try:
        outcome = execute(
            cfg, choices, sweep.name, reporter(sweep, hydra_cfg.job.num), command, given
        )
        row |= summary(outcome.metrics) | {
            "stored": outcome.stored,
            "run_id": outcome.run.path.name,
            "error": outcome.error,
        }
    except Exception as error:
        row |= {
            "status": "failed",
            "error": reason(error, given) or f"{type(error).__name__}: {error}",
        }
    record(sweep, hydra_cfg.job.num, row)


def reason(error: Exception, words: list[str]) -> str | None:
    """What to say of an error of the configuration, an input or the system; None for any other, which is a bug."""
    from harness.config.errors import ConfigError, DataError
    from harness.store import RunLocked

    if isinstance(error, ConfigError | DataError | RunLocked):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        from harness.config.hints import explain

        return explain(error, words)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return None


def failed(error: Exception, words: list[str]) -> int:
    """Say why a command ended early; the exit status for that."""
    from harness.store import RunLocked

    told = reason(error, words)
    if told is None:
        traceback.print_exception(error)
        return 1
    return refuse(told, 1 if isinstance(error, RunLocked) else 2)


def refuse(message: str, status: int = 2) -> int:
    """Say in one line what is wrong; returns the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return status


def arranged(words: list[str]) -> list[str]:
    """Flags before overrides, as Hydra's parser wants them; a ~ that begins a value is the home folder, as shells have it."""
    words = [re.sub(r"(?<=[=,\[])~(?=/|$)", lambda _: str(Path.home()), word) for word in words]
    return sorted(
        words, key=lambda word: not word.startswith("-") and ("=" in word or word.startswith("~"))
    )


def terminated(*_) -> None:
    """What SIGTERM does: what an interrupt does, so that the store knows."""
    raise KeyboardInterrupt("terminated")


def main() -> int:
    """The exit status of a command line."""
    os.environ["HARNESS_ROOT"] = str(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    )  # for jobs' processes
    os.environ.setdefault("HARNESS_SWEEP", f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # Hydra then raises instead of printing, and the message below is ours
    )
    signal.signal(signal.SIGTERM, terminated)
    words = arranged(sys.argv[1:])
    overrides = [word for word in words if word not in MULTIRUN]
    try:
        if overrides != words:
            from harness.report.sweep import sweep

            flags = [word for word in overrides if word.startswith("-")]
            return (
                refuse(f"{flags[0]}: not together with -m; leave one of them out")
                if flags
                else sweep(job, overrides)
            )
        sys.argv[1:] = words
        job()
    except KeyboardInterrupt as end:
        print(
            f"{end or 'interrupted'}; the same command goes on from the last finished block",
            file=sys.stderr,
        )
        return 143 if end.args else 130
    except ValueError as error:  # a group set to null, which Hydra does not expect
        return refuse(f"{' '.join(words)}: {error}")
    except Exception as error:
        return failed(error, words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
