"""What tables and tests need of finished runs, copied to where it outlives the run root.

Settings, figures and every window's loss, some ten kilobytes a run; no blocks, curves, samples and
figures of single layers, no secret and no name of a machine. The folder is a run root itself:
`board` reads it, and whoever adds runs to it adds rows.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from harness.report.rows import last
from harness.report.settings import publishable
from harness.store import Run
from harness.store.files import write, write_json
from harness.store.records import write_checked

STATUS = ("status", "quant_id", "started", "updated")


def keep(row: dict, folder: Path) -> Path | None:
    """The copy below `folder` of a row's run, in place of an older one; None where no finished
    stage has a perplexity."""
    source = Run(Path(row["path"]))
    metrics = source.metrics
    if metrics is None or not last(row).get("ppl"):
        return None
    target = folder / source.path.name
    write(target / "config.yaml", yaml.safe_dump(publishable(row), sort_keys=False))
    digest = write_checked(target / "metrics.json", metrics | {"layers": []})
    known = {key: source.status.get(key) for key in STATUS}
    write_json(target / "status.json", known | {"digests": {"metrics.json": digest}})
    return target
