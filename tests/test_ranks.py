"""One model over several processes: what ranks share, against one process; and how they end."""

import json
import os
import shutil

import pytest
import torch
from composed import composed
from rank_parts import (
    collectives,
    evaluation,
    learned,
    looks,
    mixture,
    observed,
    solved,
    statistics,
    tiny,
)
from rank_runs import (
    RUNS,
    launched,
    plain,
    records,
    refused,
    runs,
    solutions,
    solved_blocks,
    stored,
)
from torch.multiprocessing.spawn import spawn

from harness.parallel import ALONE, Ranks
from harness.parallel.ranks import Place
from harness.pipeline.job import execute


def everything(ranks: Ranks) -> dict:
    return {
        "collectives": collectives(ranks),
        "tiny": statistics(ranks, tiny()),
        "mixture": statistics(ranks, mixture()),
        "starved": statistics(ranks, mixture(), enough=10**6),
        "evaluation": evaluation(ranks),
        "observed": observed(ranks),
        "looks": looks(ranks),
        "learned": learned(ranks),
        "solved": solved(ranks),
        "runs": runs(ranks),
        "refused": refused(ranks),
    }


def _rank(rank: int, folder: str) -> None:
    from harness.parallel.group import Group

    torch.set_num_threads(1)
    os.environ["RANKS_FOLDER"] = folder
    group = Group.join(Place(rank, 2, rank, f"file://{folder}/meet"))
    torch.save(everything(group), f"{folder}/found.{rank}")
    group.leave()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(what one process finds, [what each of two does])."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_rank, (str(folder),), nprocs=2)
    os.environ["RANKS_FOLDER"] = str(folder)
    alone = everything(ALONE)
    load = [torch.load(folder / f"found.{rank}", weights_only=False) for rank in range(2)]
    return alone, load


def equal(one, other) -> bool:
    """In every bit, through dictionaries and lists."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def test_shares_sums_and_the_order_of_a_list(found):
    _, (first, second) = (found[0], [each["collectives"] for each in found[1]])
    assert first["share"] == first["owned"] == [0, 2, 4, 6]
    assert second["share"] == second["owned"] == [1, 3, 5]
    for each in (first, second):
        assert each["sum"] == [3.0] * 3 and each["maximum"] == [2.0] * 3
        assert each["strided"] == (3 * torch.arange(6.0).view(2, 3).T).tolist()
        assert each["merged"] == list(range(7))
        assert each["in turn"] == [[[float(n)] * n] for n in range(7)]
        assert each["raised"] == "list index out of range"
    # 0 + 1 + 2 + .. before each
    assert first["starts"] == ([0, 1, 6, 15], 21) and second["starts"] == ([0, 3, 10], 21)
    assert first["lead"] == second["lead"]


@pytest.mark.parametrize("model", ["tiny", "mixture", "starved"])
def test_statistics_are_those_of_one_process(found, model):
    alone, ranks = found
    for site, one in alone[model].items():
        several = [each[model][site] for each in ranks]
        for each in several:
            for key in ("hessian", "drift"):
                off = (each[key] - one[key]).norm() / one[key].norm().clamp_min(1e-30)
                assert off < 1e-6, (site, key)
            for key in ("range", "sample", "reference"):
                assert torch.equal(each[key], one[key]), (site, key)
            assert each["tokens"] == one["tokens"] and each["routed"] == one["routed"]
        assert equal(several[0]["hessian"], several[1]["hessian"])
        assert sum(each["rows"] for each in several) == one["rows"]


def test_a_rank_has_other_rows_of_an_expert(found):
    _, ranks = found
    rows = [[each["mixture"][site]["rows"] for each in ranks] for site in ranks[0]["mixture"]]
    assert any(first != second for first, second in rows[4:])


def test_losses_are_those_of_one_process_in_every_bit(found):
    alone, ranks = found
    one = alone["evaluation"]
    for each in ranks:
        several = each["evaluation"]
        assert torch.equal(several["losses"], one["losses"])
        assert torch.equal(several["streamed"], one["streamed"])
        assert several["kl"] == pytest.approx(one["kl"], rel=1e-12) and one["kl"] > 0
        assert several["top1"] == one["top1"]


def test_collectors_see_the_text_in_its_order(found):
    alone, ranks = found
    for each in ranks:
        assert equal(each["observed"]["samples"], alone["observed"]["samples"])
        assert equal(each["observed"]["covariances"], alone["observed"]["covariances"])
    assert [each["observed"]["windows"] for each in ranks] == [[[0, 2, 4]] * 2, [[1, 3]] * 2]


def test_looks_at_a_model_are_those_of_one_process_in_every_bit(found):
    alone, ranks = found
    assert alone["looks"]["gain"] != 0
    for each in ranks:
        assert each["looks"] == alone["looks"]


def test_gradients_are_those_of_one_process(found):
    alone, ranks = found
    one = alone["learned"]
    for each in ranks:
        torch.testing.assert_close(each["learned"]["x"], one["x"], rtol=1e-6, atol=0)
        assert each["learned"]["losses"] == pytest.approx(one["losses"], rel=1e-6)
        assert each["learned"]["gradient"].tolist() == [1.0, 1.0]
        assert each["learned"]["untouched"]
    assert equal(ranks[0]["learned"], ranks[1]["learned"])


def test_linears_are_solved_apart_as_side_by_side(found):
    alone, ranks = found
    one = alone["solved"]
    assert equal(ranks[0]["solved"], ranks[1]["solved"])
    several = ranks[0]["solved"]
    assert several["names"] == one["names"] and several["report"] == one["report"]
    assert equal(several["globals"], one["globals"])
    # the 40 stands where nothing is read, and is no part of the scale
    greatest = max(float(weight.abs().max()) for weight in one["weights"].values())
    assert greatest < 10
    for name, weight in one["weights"].items():
        same = (several["weights"][name] == weight).float().mean()
        assert same > 0.99, name


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_equal_in_every_bit(found, name):
    for each in found[1]:
        first, again = each["runs"][name]
        assert equal(first, again)
        assert equal(first, found[1][0]["runs"][name][0])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_one_process(found, name):
    """But for the order of sums: what is learned is, step by step, and so is what comes of it."""
    (one,) = found[0]["runs"][name]
    several = found[1][0]["runs"][name][0]
    assert several["tensors"].keys() == one["tensors"].keys()
    assert len(several["curves"]) == len(one["curves"])
    # what is solved from sums of both ranks has some codes on a border, and errors that follow
    near = 0.1 if name == "plain" else 1e-3
    for point, alone in zip(several["curves"], one["curves"], strict=True):
        assert point == pytest.approx(alone, rel=near)
    for layer, alone in zip(several["layers"], one["layers"], strict=True):
        losses = {key: value for key, value in alone.items() if key.startswith("loss_")}
        assert {key: layer[key] for key in losses} == pytest.approx(losses, rel=1e-3)
    alike(several["records"], one["records"])


def alike(several: list[dict], one: list[dict]) -> None:
    """Weights on the border between two codes fall otherwise with the last bit of a sum."""
    for record, alone in zip(several, one, strict=True):
        near = {"kl": 0.1, "ppl": 0.05, "top1": 0.1}[record["metric"]]
        assert record["value"] == pytest.approx(alone["value"], rel=near)
        if record["stage"] == "baseline":
            assert record["value"] == alone["value"]


def test_all_ranks_say_what_one_process_says(found):
    stages = [each["runs"]["signround"][0]["stages"] for each in (found[0], *found[1])]
    said = [stage["baseline"]["texts"] for stage in stages]
    assert len(said[0]) == 2 and said[0] == said[1] == said[2]


def test_a_setting_that_is_wrong_is_said_once(found):
    statuses, said, begun = zip(*(each["refused"] for each in found[1]))
    assert statuses == (2, 2) and not any(begun)
    assert "".join(said).count("error: format.weight.group_size") == 1


def test_ranks_that_end_and_who_goes_on(found, tmp_path, monkeypatch):
    """A run goes on from its last block with any number of ranks, whoever ended it."""
    folder = tmp_path / "mortal"
    ended = launched(folder, "raise 1")
    run, status = stored(folder)
    assert ended.returncode
    assert status["status"] == "failed"
    assert "rank 1: ValueError: no luck" in status["error"]
    assert "rank 1: ValueError: no luck" in ended.stderr
    assert [path.name for path in run.glob("blocks/*")] == ["0000.safetensors"]

    for rank in (1, 0):
        ended = launched(folder, f"kill {rank}")
        _, status = stored(folder)
        assert ended.returncode
        assert status["status"] == "failed"
        assert f"rank {rank} (process " in status["error"] and "was killed" in status["error"]
        assert status["error"].partition(": ")[2] in ended.stderr
        assert len(solutions(run)) == 1

    alone = shutil.copytree(folder, tmp_path / "alone")
    two = launched(folder)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("run directory") == 1  # one rank talks
    _, status = stored(folder)
    assert status["status"] == "done"
    undisturbed = found[1][0]["runs"]["plain"][0]
    assert solutions(run) == solved_blocks(undisturbed)
    assert records(run) == undisturbed["records"]
    assert json.loads((run / "environment.json").read_text())["compute"]["ranks"] == 2

    # ranks are no part of what a run is known by: one process goes on with it, or finds it done
    settings = composed(*plain())
    monkeypatch.chdir(alone)
    begun = solutions(stored(alone)[0])
    one = execute(*settings)
    assert one.status == "done" and not one.stored
    assert solutions(one.run.path)[:1] == begun
    near = found[0]["runs"]["plain"][0]["records"]
    alike(records(one.run.path), near)
    monkeypatch.chdir(folder)
    assert execute(*settings).stored
