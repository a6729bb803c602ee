"""Weights & Biases by its own conventions.

The id is the run's fingerprint, so a resumed run continues its curves; the group is the sweep; the
files lie in the run directory, so an offline run travels with it (`wandb sync <run
directory>/wandb/offline-*`).

An explicit setting wins; where it is null, W&B's environment variables (WANDB_MODE, WANDB_PROJECT,
WANDB_ENTITY, WANDB_NAME, WANDB_DIR, ...) decide. Without a login, or when the server cannot be
reached, the run is written offline.

W&B's global step may never fall, and blocks, optimizer steps and evaluations all count from zero: a
shared step would drop every family but the longest. So each family of curves `family/*` is drawn
over its own `family/index`.

At the end the curves over the blocks are logged once more as figures (`figures/rel_error`, ...),
for W&B reports and galleries; the page of a run becomes the artifact of type `report` that bears
the run's id.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.config.errors import ConfigError
from harness.config.extras import installed
from harness.tracking.base import Plain, RunInfo, Tracker, plain, plain_fields, without_secrets

log = logging.getLogger(__name__)
MODES = ("online", "offline", "shared", "disabled")
PROJECT = "low-bit"
FIGURES = {  # {curve: label of its axis}
    "block/rel_error": "relative output error",
    "block/sqnr_db": "SQNR [dB]",
}
INIT_TIMEOUT = "30"  # seconds to reach the server before the run goes offline
FINISH_TIMEOUT = "60"  # seconds an upload may hold up a run's end; the files stay on disk


class Wandb(Tracker):
    """One W&B run. project, entity, name, mode: null leaves them to the environment; tags are added
    to the run's own.

    resume: what W&B does where it has a run of this id: `allow` goes on with it, None starts it
    anew. Raises ConfigError for an unknown mode. `warn` is told when a wished-for online run is
    written offline.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        mode: str | None = None,
        tags: Sequence[str] = (),
        resume: str | None = "allow",
        warn: Callable[[str], None] = log.warning,
    ):
        if mode is not None and mode not in MODES:
            raise ConfigError(
                f"tracking.mode={mode!r} is unknown; choose from {', '.join(MODES)}, "
                "or null to let W&B decide"
            )
        self._project = project
        self._entity = entity
        self._name = name
        self._mode = mode
        self._tags = tuple(tags)
        self._resume = resume
        self._warn = warn
        self._axes: set[str] = set()
        self._points: dict[str, dict[int, Plain]] = {}

    def start(self, config: dict, run: RunInfo) -> None:
        import wandb

        environment = os.environ.get
        run.directory.mkdir(parents=True, exist_ok=True)
        settings: dict = {
            "id": run.run_id,
            "resume": self._resume,
            "reinit": "create_new",
            "project": self._project or environment("WANDB_PROJECT", PROJECT),
            "entity": self._entity or environment("WANDB_ENTITY"),
            "name": self._name or environment("WANDB_NAME", run.run_id),
            "group": run.group or environment("WANDB_RUN_GROUP"),
            "job_type": environment("WANDB_JOB_TYPE", run.job_type),
            "tags": [*dict.fromkeys((*run.tags, *self._tags))] or None,
            "dir": environment("WANDB_DIR", str(run.directory)),
            "config": plain(without_secrets({**config, "quant_id": run.quant_id})),
            "settings": wandb.Settings(
                silent=True,
                console="off",
                init_timeout=float(environment("WANDB_INIT_TIMEOUT", INIT_TIMEOUT)),
                finish_timeout=float(environment("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT)),
            ),
        }
        try:
            settings["mode"] = self._reachable_mode()
            self._run = wandb.init(**settings)
        except Exception as error:
            # The half-open run keeps its id in use until the service that holds it is gone.
            wandb.teardown()
            settings["mode"] = "offline"
            self._run = wandb.init(**settings)
            self._warn(
                f"tracking: W&B did not start ({error}); the run is written offline, "
                "`wandb sync` sends it later"
            )

    @property
    def address(self) -> str:
        """Where the started run is: its address, or the folder that `wandb sync` sends."""
        return str(self._run.sync_dir if self._run.offline else self._run.url)

    def log(self, values: dict, step: int) -> None:
        fields = plain_fields(values)
        axes: dict[str, int] = {}
        for key, value in fields.items():
            family, slash, _ = key.partition("/")
            axis = f"{family}/index" if slash else "index"
            curves = f"{family}/*" if slash else key
            if curves not in self._axes:
                self._axes.add(curves)
                self._run.define_metric(axis, hidden=True)
                self._run.define_metric(curves, step_metric=axis)
            axes[axis] = step
            if key in FIGURES:
                self._points.setdefault(key, {})[step] = value
        self._run.log({**axes, **fields})

    def table(self, name: str, rows: list[dict]) -> None:
        import wandb

        columns = [*dict.fromkeys(key for row in rows for key in row)]
        data: list = [[plain(row.get(column)) for column in columns] for row in rows]
        self._run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def page(self, path: Path) -> None:
        import wandb

        # W&B would copy the file to the home directory; here the copy travels with the run and
        # outlives a new page.
        copy = shutil.copy(path, self._run.dir)
        artifact = wandb.Artifact(
            re.sub(r"[^\w.-]", "_", self._run.id, flags=re.ASCII), type="report"
        )
        artifact.add_file(copy, policy="immutable")
        self._run.log_artifact(artifact)

    def finish(self, summary: dict, status: str = "done") -> None:
        if self._points and installed("plotly"):
            self._run.log(self._figures())
        self._run.summary.update({**plain_fields(summary), "status": status})
        self._run.finish(exit_code=0 if status == "done" else 1)

    def _figures(self) -> dict:
        """A figure for every curve of FIGURES that was logged, over the block."""
        from plotly.graph_objects import Figure, Scatter

        figures = {}
        for key, points in self._points.items():
            blocks = sorted(points)
            figure = Figure(
                Scatter(x=blocks, y=[points[block] for block in blocks], mode="lines+markers")
            )
            figures[f"figures/{key.rpartition('/')[2]}"] = figure.update_layout(
                xaxis_title="block", yaxis_title=FIGURES[key]
            )
        return figures

    def _reachable_mode(self) -> str:
        """The mode asked for, or `offline` where only a login is missing: W&B itself would stop and
        ask for one."""
        import wandb

        mode = self._mode or os.environ.get("WANDB_MODE", "online")
        settings: dict = {"silent": True, "mode": mode}  # W&B refuses a mode that it does not know
        wandb.setup(wandb.Settings(**settings))
        if mode != "online" or wandb.login(prompt=False, verify=False):
            return mode
        if self._mode == "online":
            self._warn(
                "tracking.mode=online needs a W&B login (`wandb login` or WANDB_API_KEY); "
                "the run is written offline"
            )
        return "offline"
