"""One model over several processes: what ranks share, against one process; and how they end."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
import zoo
from composed import ROOT, SMALL, composed
from torch.multiprocessing.spawn import spawn

from harness.calibration.outliers import profiles
from harness.calibration.shipped import Pydoc
from harness.calibration.statistics import Statistics
from harness.calibration.stream import Stream
from harness.calibration.subject import StreamedModel
from harness.calibration.windows import bos_gain
from harness.command.run import run as command
from harness.evaluation.divergence import Reference
from harness.evaluation.perplexity import window_losses
from harness.formats import NVFP4
from harness.models.adapter import Adapter
from harness.models.merge import swap
from harness.models.tiny import Tiny
from harness.parallel import ALONE, Ranks
from harness.parallel.gradients import add_gradients
from harness.parallel.joined import first_host, place
from harness.parallel.ranks import Place
from harness.pipeline.job import execute
from harness.quantize.spread import assigned, spread
from harness.solvers import AWQ, GPTQ, Problem
from harness.store import Run
from harness.tracking.replay import Record
from harness.transforms.loop import Course, descend
from harness.transforms.sampling import Covariance, Reservoir

IDS = torch.randint(256, (5, 48), generator=torch.Generator().manual_seed(0))


# What one process finds, and each of several: the same functions, given their ranks.


def collectives(ranks: Ranks) -> dict:
    """Of seven items on two ranks, one has more than the other."""
    total = torch.full((3,), float(ranks.rank + 1))
    greatest = total.clone()
    strided = torch.arange(6.0).view(2, 3).T * (ranks.rank + 1)
    ranks.sum_(total, strided)
    ranks.maximum_(greatest)
    items = ranks.share(list(range(7)))
    in_turn = ranks.in_turn(torch.full((1, item), float(item)) for item in items)
    try:
        ranks.lead(lambda: [][0])
        raised = ""
    except IndexError as error:
        raised = str(error)
    return {
        "sum": total.tolist(),
        "strided": strided.tolist(),
        "maximum": greatest.tolist(),
        "share": items,
        "owned": [item for item in range(7) if ranks.owns(item)],
        "merged": ranks.merged(items),
        "starts": ranks.starts(items),
        "in turn": [tensor.tolist() for tensor in in_turn],
        "lead": ranks.lead(lambda: os.getpid()),
        "raised": raised,
    }


def tiny() -> Adapter:
    model, _ = Tiny().load()
    adapter = Adapter(model.requires_grad_(False))
    swap(adapter)
    return adapter


def mixture() -> Adapter:
    """Routed experts, of which a share of the text leaves some without a token."""
    adapter = Adapter(zoo.make("mixtral").requires_grad_(False))
    swap(adapter)
    return adapter


@torch.no_grad()
def statistics(ranks: Ranks, adapter: Adapter, enough: int | None = 0) -> dict:
    """Of every site of the first block."""
    found = {}
    stream = Stream(adapter, IDS, tokens_at_once=48, enough=enough, ranks=ranks)
    for site, arriving in stream.walk(adapter.blocks[0]):
        width = adapter.width(site, 0)
        gathered = Statistics(width, stream.tokens, "cpu", width, ranks)
        rows = 0
        for x, start in zip(arriving, arriving.starts, strict=True):
            gathered.add(x, untouched=1.5 * x, start=start)
            rows += x.flatten(0, -2).shape[0]
        if gathered.drift is None:
            gathered.compares()
        gathered.finish()
        found[site.name] = {
            "hessian": gathered.hessian,
            "drift": gathered.drift,
            "range": gathered.range,
            "sample": gathered.sample,
            "reference": gathered.reference,
            "tokens": gathered.tokens,
            "routed": arriving.routed,
            "rows": rows,
        }
    return found


def evaluation(ranks: Ranks) -> dict:
    """Losses of three windows, and the divergence from a model with other weights."""
    adapter = tiny()
    reference = Reference(adapter)
    own = reference.recorder("text")
    losses = window_losses(adapter, IDS[:3], watch=own, ranks=ranks)
    streamed = window_losses(adapter, IDS[:3], streaming=True, ranks=ranks)
    folder = Path(ranks.lead(lambda: os.environ["RANKS_FOLDER"]))
    path = folder / f"hidden.{ranks.count}.safetensors"
    reference.save(path, ranks)
    with torch.no_grad():
        adapter.head.weight.mul_(1.25)
    compared = reference.compare("text", path, IDS.shape[1], ranks)
    window_losses(adapter, IDS[:3], watch=compared, ranks=ranks)
    return {"losses": losses, "streamed": streamed, **compared.figures}


def observed(ranks: Ranks) -> dict:
    """What collectors that know nothing of ranks find."""
    model = StreamedModel(tiny(), IDS, ranks=ranks)
    sites = ("attn_in", "down_in", "head")
    covariances = model.observe(lambda _, __, width: Covariance(width, True), sites, "")
    samples = model.observe(lambda *key: Reservoir(20, *key), sites, "")
    return {
        "covariances": {str(key): value for key, value in covariances.items()},
        "samples": {str(key): value for key, value in samples.items()},
        "windows": [sorted(block.inputs) for block in model.blocks()],
    }


def looks(ranks: Ranks) -> dict:
    """What is seen of a model and its text before anything is done to it."""
    adapter = tiny()
    seen = {}
    for name, each in (("tiny", adapter), ("mixture", mixture())):
        seen[name] = {str(key): profile for key, profile in profiles(each, IDS, ranks).items()}
    return {"profiles": seen, "gain": bos_gain(adapter.model, IDS[0], 0, ranks)}


class Point:
    """A point in the plane that moves down its gradient."""

    def __init__(self):
        self.x = torch.tensor([3.0, -1.0], requires_grad=True)
        self.rest = torch.zeros(2, requires_grad=True)  # which nothing moves

    def step(self) -> None:
        with torch.no_grad():
            if self.x.grad is not None:
                self.x -= 0.05 * self.x.grad
        self.x.grad = None

    def snapshot(self) -> dict:
        return {"x": self.x.detach().clone()}

    def leaves(self) -> list:
        return [self.x, self.rest]


def learned(ranks: Ranks) -> dict:
    """Batches of three windows of nine, of which a rank has one or two."""
    text = StreamedModel(tiny(), torch.arange(10.0)[:, None], ranks=ranks)
    moving = Point()

    def loss(ids: torch.Tensor, again: bool) -> torch.Tensor:
        return ((moving.x - ids[0, 0]) ** 2).sum()

    best = descend(text, moving, loss, Course(6, 3, "test", "test", ""))
    moving.x.grad = torch.ones(2) if ranks.first else None
    add_gradients(moving.leaves(), ranks)
    return {
        "x": best.values["x"],
        "losses": [best.first, best.loss, *best.train],
        "gradient": moving.x.grad,
        "untouched": moving.rest.grad is None,
    }


def problem() -> Problem:
    """Three linears with a shared global scale and a feature that is always 0, where one of them
    has its greatest weight."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(256, 64, generator=random)
    x[:, 5] = 0
    sizes = {"q": 48, "k": 16, "v": 16}
    weights = {name: torch.randn(rows, 64, generator=random) for name, rows in sizes.items()}
    weights["k"][3, 5] = 40
    weights["v"][2, 7] = 9
    formats = dict.fromkeys(weights, NVFP4(role="weight"))
    return Problem(weights, formats, 2 / 256 * x.T @ x)


def solved(ranks: Ranks) -> dict:
    solutions = spread(GPTQ(), [{"attn_in": problem()}], ranks)
    solution = solutions["attn_in"]
    return {
        "names": list(solution.qtensors),
        "weights": {name: q.dequantize() for name, q in solution.qtensors.items()},
        "globals": [q.scales.global_scale for q in solution.qtensors.values()],
        "report": solution.report,
    }


WORDS = [
    *SMALL,
    "data=text",
    "data.path={folder}/text",
    "data.name=pydoc",
    "eval.perplexity.corpora=[data]",
    "run_root={root}",
]
# Each rank has micro-batches of its own; steps on one window, which one rank has, and on three, of
# which one has two.
RUNS = {
    "plain": ["data.calibration.length=512"],
    "adascale": [
        "format=nvfp4",
        "transform=spinquant",
        "transform.steps=2",
        "transform.r3=off",
        "transform.r4=off",
        "solver=adascale",
        "solver.iterations=6",
        "export=compressed_tensors",
        "export.path={root}/exports",
    ],
    "signround": [
        "format=int4",
        "transform=flatquant",
        "transform.steps=2",
        "solver=signround",
        "solver.steps=6",
        "solver.batch=3",
        "data.calibration.windows=7",
        "tune=scales",
        "tune.steps=3",
        "tune.windows=4",
        "eval=generate",
        "eval.generate.tokens=4",
    ],
}


def texts(folder: Path) -> None:
    """The corpus of whole runs."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for file, part in (("train.txt", "calibration"), ("test.txt", "evaluation")):
        (folder / "text" / file).write_text(Pydoc().text(part)[:8000])


def runs(ranks: Ranks) -> dict:
    """Whole runs: what each leaves behind, of one process once, of two ranks twice."""
    folder = Path(ranks.lead(lambda: os.environ["RANKS_FOLDER"]))
    ranks.lead(lambda: texts(folder))

    def done(name: str, words: list[str], time: int) -> dict:
        root = folder / f"{name}.{ranks.count}.{time}"
        settings = [word.format(folder=folder, root=root) for word in (*WORDS, *words)]
        outcome = execute(*ranks.lead(lambda: composed(*settings)), ranks=ranks)
        return ranks.lead(lambda: left(outcome.run, root))

    return {
        name: [done(name, words, time) for time in range(ranks.count)]
        for name, words in RUNS.items()
    }


def left(run: Run, root: Path) -> dict:
    """The numbers of a run that is done, and all tensors that it wrote."""
    metrics = run.metrics
    assert metrics is not None and metrics["status"] == "done", run.status
    return {
        "records": metrics["records"],
        "stages": metrics["stages"],
        "layers": metrics["layers"],
        "curves": [point for _, point in Record.read(run).curves],
        "tensors": {
            # its name is that of its settings, of which the export's folder is one
            str(path.relative_to(root)).replace(run.path.name, "run"): path.read_bytes()
            for path in sorted(root.rglob("*.safetensors"))
        },
    }


def refused(ranks: Ranks) -> tuple:
    """How a command ends with a setting that is wrong, and what it says; of several ranks."""
    if ranks.count == 1:
        return ()
    os.environ |= {
        "RANK": str(ranks.rank),
        "LOCAL_RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(ranks.lead(free_port)),
    }
    root = Path(os.environ["RANKS_FOLDER"]) / "refused"
    said = io.StringIO()
    with redirect_stderr(said), pytest.raises(SystemExit) as end:
        command(["model=tiny", f"run_root={root}", "format.weight.group_size=7"])
    return end.value.code, said.getvalue(), root.exists()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


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


def test_the_largest_go_first_and_what_wants_a_site_whole_gets_it():
    weights = {"a": torch.zeros(5, 8), "b": torch.zeros(4, 8), "c": torch.zeros(3, 8)}
    posed = [Problem(weights, dict.fromkeys(weights, NVFP4(role="weight")))]
    assert assigned(GPTQ(), posed, 2) == {"a": 0, "b": 1, "c": 1}
    assert set(assigned(AWQ(), posed, 2).values()) == {0}
    assert set(assigned(GPTQ(), posed, 1).values()) == {0}


def test_who_launched_says_the_place():
    assert place({}) is None
    assert place({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}) is None
    torchrun = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
    assert place(torchrun) == Place(3, 4, 1, "env://")
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_JOB_ID": "41234",
    }
    assert place(slurm) == Place(1, 2, 0, "tcp://gpu03:21234")
    # a batch script is a process alone, whatever its job has
    assert place({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) is None
    assert [first_host(n) for n in ("a1", "a1,b2", "a[1,3-4],b")] == ["a1", "a1", "a1"]


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


# The same by torchrun.


def launched(folder: Path, end: str = "") -> subprocess.CompletedProcess:
    """The plain run on two ranks, which ends as mortal.py has it."""
    texts(folder)
    if end:
        (folder / "end").write_text(end)
    else:
        (folder / "end").unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = str(ROOT / "tests" / "mortal.py")
    line = [sys.executable, *launcher, script, *plain()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def plain() -> list[str]:
    """The settings of the plain run, in a folder of its own."""
    return [word.format(folder=".", root="runs") for word in (*WORDS, *RUNS["plain"])]


def stored(folder: Path) -> tuple[Path, dict]:
    """The run directory, and its status.json."""
    (run,) = folder.glob("runs/tiny*")
    return run, json.loads((run / "status.json").read_text())


def solutions(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(run.glob("blocks/*"))]


def solved_blocks(run: dict) -> list[bytes]:
    """The same of a run in this process."""
    return [content for path, content in run["tensors"].items() if "/blocks/" in path]


def records(run: Path) -> list[dict]:
    return json.loads((run / "metrics.json").read_text())["records"]


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
