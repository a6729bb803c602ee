"""A W&B workspace that compares runs.

    python -m harness.tracking.dashboard --entity E --project P [--save]

Runs side by side, perplexities, perplexity against bits per weight, errors over the blocks by
sweep. Without --save its specification is printed as JSON. Needs the package wandb-workspaces;
saving needs a login. Exit status 2 where one is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

from harness.config.errors import reason

CORPORA = ("pydoc", "stdlib")  # what a run measures unless told otherwise
CHOICES = ("model.name", "format.name", "transform.name", "solver.name")
CURVES = ("block/rel_error", "block/worst_rel_error", "block/sqnr_db")


class View(Protocol):
    """What of a workspace is used here."""

    _spec: dict

    def save(self) -> View: ...

    @property
    def url(self) -> str: ...


def workspace(entity: str, project: str, corpora: Sequence[str] = CORPORA) -> View:
    """The workspace, unsaved: for each corpus a bar plot and a scatter plot. Raises ImportError
    without wandb-workspaces."""
    wr = import_module("wandb_workspaces.reports.v2")
    workspaces = import_module("wandb_workspaces.workspaces")

    bits = wr.SummaryMetric("bits_per_weight")
    ppl = [f"ppl/quantized/{corpus}" for corpus in corpora]
    axes = [*map(wr.Config, CHOICES), bits, *map(wr.SummaryMetric, ppl)]
    columns = [wr.ParallelCoordinatesPlotColumn(metric=axis) for axis in axes]
    panels = {
        "Perplexity": [
            *(wr.BarPlot(title=key, metrics=[key]) for key in ppl),
            *(
                wr.ScatterPlot(title=f"{key} by bits per weight", x=bits, y=wr.SummaryMetric(key))
                for key in ppl
            ),
        ],
        "Choices": [
            wr.ParallelCoordinatesPlot(title="from choice to perplexity", columns=columns),
            wr.RunComparer(diff_only="split"),
        ],
        "Blocks": [
            wr.LinePlot(
                title=curve,
                x="block/index",
                y=[curve],
                title_x="block",
                groupby="Group",
                groupby_aggfunc="mean",
                groupby_rangefunc="minmax",
            )
            for curve in CURVES
        ],
    }
    sections = [
        workspaces.Section(name=name, panels=content, is_open=True)
        for name, content in panels.items()
    ]
    return workspaces.Workspace(
        entity=entity, project=project, name="Low-bit comparison", sections=sections
    )


def save(view: View) -> str:
    """Save the workspace; its address. Raises PermissionError without a login, else what W&B
    raises."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=False):
        raise PermissionError("saving needs a W&B login (`wandb login` or WANDB_API_KEY)")
    return view.save().url


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of a command line; the specification, or with --save the address, on standard
    output."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.tracking.dashboard",
        description="A W&B workspace that compares runs.",
    )
    parser.add_argument("--entity", required=True)
    parser.add_argument("--project", required=True)
    parser.add_argument(
        "--corpora", nargs="+", default=CORPORA, help=f"default: {' '.join(CORPORA)}"
    )
    parser.add_argument("--save", action="store_true", help="save it instead of printing it")
    asked = parser.parse_args(arguments)
    try:
        view = workspace(asked.entity, asked.project, asked.corpora)
        # W&B offers no public way to what it saves.
        print(save(view) if asked.save else json.dumps(view._spec, indent=1))
    except ImportError as error:
        print(f"error: {error}; `pip install wandb-workspaces`", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"error: the workspace was not saved: {reason(error)}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
