"""The command line: compose the configuration, hand it over, turn the outcome into a table and an exit status.

Exit status: 0 done (failures recorded under on_error=record too), 1 a run failed, 2 the configuration or an input is wrong.
Imports no torch: help, completion and stored results answer at once.
"""

import os
import shlex
import sys
import time
from concurrent.futures import BrokenExecutor
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parent
GROUPS = ("model", "data", "format", "transform", "solver", "eval", "export", "tracking", "experiment", "sweeps")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(cfg) -> None:
    """One run, or one job of a sweep; a sweep's job never raises, so that the others finish."""
    from harness.errors import ConfigError, DataError
    from harness.pipeline import execute
    from harness.report.sweep import record, reporter, summary
    from harness.report.table import run_table
    from harness.store import RunLocked

    hydra_cfg = HydraConfig.get()
    choices = {group: hydra_cfg.runtime.choices.get(group) for group in GROUPS}
    sweep = Path(hydra_cfg.sweep.dir) if hydra_cfg.mode == RunMode.MULTIRUN else None
    command = replay(hydra_cfg.overrides.task, alone=bool(choices["sweeps"] or choices["experiment"]))
    if sweep is None:
        if choices["sweeps"] and "hydra.mode=RUN" not in sys.argv:  # as `replay` writes it
            sys.exit(refuse(f"sweeps={choices['sweeps']}: a sweep needs -m, e.g. python run.py -m sweeps={choices['sweeps']}"))
        try:
            outcome = execute(cfg, choices, command=command)
        except (ConfigError, DataError) as error:  # here, for Hydra would announce the exception on its way out
            sys.exit(refuse(error))
        except RunLocked as error:
            refuse(error)
            sys.exit(1)
        if outcome.stored:
            print("stored result (force=true computes again)", file=sys.stderr)
        run_table(outcome.metrics, outcome.run.path)
        if outcome.status == "failed":
            print(f"{outcome.error}\nThe traceback is in {outcome.run.path / 'status.json'}.", file=sys.stderr)
            sys.exit(1 if cfg.on_error == "raise" else 0)
        return
    row = {"overrides": list(hydra_cfg.overrides.task)}
    try:
        outcome = execute(cfg, choices, sweep.name, reporter(sweep, hydra_cfg.job.num), command)
        row |= summary(outcome.metrics) | {"stored": outcome.stored, "run_id": outcome.run.path.name, "error": outcome.error}
    except (ConfigError, DataError) as error:
        row |= {"status": "failed", "error": str(error)}
    except Exception as error:
        row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    record(sweep, hydra_cfg.job.num, row)


def replay(overrides: list[str], alone: bool) -> str:
    """The command that runs a job again; alone: out of an option that would start a sweep."""
    return shlex.join(["python", "run.py", *overrides, *(["hydra.mode=RUN"] if alone else [])])


def refuse(message: object) -> int:
    """Say what is wrong with the configuration or an input; the exit status for that."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def main() -> int:
    """The exit status of a command line."""
    os.environ["HARNESS_ROOT"] = str(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # for jobs' processes
    os.environ.setdefault("HARNESS_SWEEP", f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, and the message below is ours
    try:
        job()
    except BrokenExecutor:  # a worker was killed, and the pool gave up
        from harness.report.sweep import close

        close(OmegaConf.load(Path(HydraConfig.get().sweep.dir) / "multirun.yaml"))
    except (HydraException, OmegaConfBaseException) as error:
        from harness.hints import explain

        return refuse(explain(error, sys.argv[1:]))
    except OSError as error:
        return refuse(f"{error.filename}: {error.strerror}" if error.filename else error)
    except ValueError as error:  # a group set to null, which Hydra does not expect
        return refuse(f"{' '.join(sys.argv[1:])}: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last finished block", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
