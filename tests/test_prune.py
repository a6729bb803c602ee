"""What prune removes of stored runs, and what it keeps."""

import os
from pathlib import Path

from stored_runs import piped, root, stored

from harness.report import __main__ as terminal
from harness.report.__main__ import main
from harness.store import Run, locked, write

__all__ = ["piped", "root"]  # fixtures


def files(root: Path) -> set[str]:
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def test_prune_lists_and_then_removes(root, capsys):
    os.link(
        root / "tiny-int4-identity-gptq-bbbbbbbbb3/blocks/0000.safetensors",
        root / "tiny-nvfp4-identity-gptq-aaaaaaaaa1/blocks/0001.safetensors",
    )
    before = files(root)
    assert main(["prune", str(root)]) == 0
    listed = capsys.readouterr().out
    assert "2 to remove, 2.0 MB" in listed and "--yes" in listed  # the linked block frees nothing
    assert files(root) == before
    with locked(root / "tiny-int4-identity-rtn-bbbbbbbbb4/lock"):  # held: it runs
        assert main(["prune", str(root), "--yes"]) == 0
        assert "bbbbbbbbb4" not in capsys.readouterr().out
    assert files(root) == {name for name in before if "bbbbbbbbb3" not in name}
    assert (
        root / "tiny-nvfp4-identity-gptq-aaaaaaaaa1/blocks/0001.safetensors"
    ).stat().st_size == 2_000_000
    assert main(["prune", str(root), "solver=gptq", "--yes", "--blocks"]) == 0
    gone = {"bbbbbbbbb3", "aaaaaaaaa1/blocks"}
    assert files(root) == {name for name in before if not any(part in name for part in gone)}
    assert sorted(path.name for path in root.glob("_*")) == ["_shared"]
    assert main(["show", str(root), "aaaaaaaaa1"]) == 0


def test_prune_leaves_a_run_that_is_tried_again(root, capsys):
    """Its status still says failed, but a process has taken the lock."""
    before = files(root)
    with locked(root / "tiny-int4-identity-gptq-bbbbbbbbb3/lock"):
        assert main(["prune", str(root), "status=failed", "--yes"]) == 0
    assert "bbbbbbbbb3: left alone" in capsys.readouterr().out
    assert files(root) == before


def test_prune_leaves_a_run_that_ended_since_it_was_listed(root, capsys, monkeypatch):
    run, before = Run(root / "tiny-int4-identity-gptq-bbbbbbbbb3"), files(root)
    listed = terminal.freed

    def meanwhile(targets):
        run.set_status(status="done")
        return listed(targets)

    monkeypatch.setattr(terminal, "freed", meanwhile)
    assert terminal.main(["prune", str(root), "status=failed", "--yes"]) == 0
    assert "bbbbbbbbb3: left alone" in capsys.readouterr().out
    assert files(root) == before


def test_prune_follows_no_links(root, tmp_path):
    outside = stored(tmp_path / "elsewhere", "tiny-int4-identity-gptq-ccccccccc6", "failed")
    (root / outside.name).symlink_to(outside)
    for name in ("tiny-nvfp4-identity-gptq-aaaaaaaaa1", "tiny-int4-identity-gptq-bbbbbbbbb3"):
        (root / name / "blocks").rename(root / name / "own")
        (root / name / "blocks").symlink_to(outside / "blocks")
    kept = files(tmp_path / "elsewhere")
    assert main(["prune", str(root), "--yes", "--blocks"]) == 0
    assert files(tmp_path / "elsewhere") == kept
    assert (root / "tiny-nvfp4-identity-gptq-aaaaaaaaa1/blocks").is_symlink()
    assert not (root / "tiny-int4-identity-gptq-bbbbbbbbb3").exists()


def test_prune_keeps_finished_figures_whose_status_is_lost(root):
    path = root / "tiny-nvfp4-identity-gptq-aaaaaaaaa1"
    write(path / "status.json", '{"status": "do')
    assert main(["prune", str(root), "--yes"]) == 0
    assert (path / "metrics.json").is_file()
