"""Small runs that export, and what they left behind."""

from composed import small

from harness.pipeline.job import execute

PLAIN = ["format=nvfp4", "solver=rtn"]
RIGHT = {
    "harness": ["transform=quarot", "format.kv.bits=4"],
    "compressed_tensors": ["transform=quarot", "transform.r4=off"],
}


def run(tmp_path, *settings):
    place = (
        [f"export.path={tmp_path / 'out'}"]
        if any(setting.startswith("export=") for setting in settings)
        else []
    )
    cfg, choices = small(tmp_path, *PLAIN, *place, *settings)
    return execute(cfg, choices, command="python run.py again")


def left(tmp_path) -> list[str]:
    found = (tmp_path / "out").iterdir() if (tmp_path / "out").exists() else []
    return sorted(path.name for path in found if not path.name.endswith(".lock"))
