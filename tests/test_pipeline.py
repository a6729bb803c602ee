"""Whole runs on the tiny model: every format with every solver, resumption bit for bit, the store,
the gate."""

import json
import os
import re
import shutil
import threading
from pathlib import Path
from statistics import fmean

import pytest
import torch
from composed import NEAR, ROOT, divergence, run, small

from harness.calibration.shipped import Pydoc
from harness.calibration.statistics import Statistics
from harness.calibration.stream import Stream
from harness.calibration.windows import tokenize, windows
from harness.config.build import build, option, settings
from harness.config.errors import ConfigError, DataError
from harness.formats import NVFP4, Format, Scheme
from harness.models.adapter import Adapter
from harness.models.merge import swap
from harness.models.tiny import Tiny
from harness.pipeline.job import Attempt, execute
from harness.pipeline.plan import make_plan
from harness.quantize import blocks
from harness.quantize.block_state import BlockState
from harness.solvers import GPTQ, Solver
from harness.store import RunLocked, Store, files, locked
from harness.transforms import Rotation

# those of a cache alone leave no weight to a solver: test_window.py
WEIGHTS = {
    path.stem: build(option("format", path.stem)["weight"], "format.weight", Format)
    for path in sorted((ROOT / "conf" / "format").glob("*.yaml"))
}
FORMATS = [name for name, weight in WEIGHTS.items() if weight is not None]
SOLVERS = sorted(
    path.stem for path in (ROOT / "conf" / "solver").glob("*.yaml") if path.stem != "none"
)
QUICK = {
    "adascale": ["solver.iterations=2"],
    "adascale_paper": ["solver.iterations=2"],
    "awq": ["solver.grid=3"],
    "faar": ["solver.steps=2"],
    "signround": ["solver.steps=2"],
}


def numbers(metrics):
    return metrics["stages"], metrics["layers"], metrics["bits_per_weight"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Where runs find what others have of the same model and text: tokens, the untouched model's
    figures, what it reads."""
    return tmp_path_factory.mktemp("store")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_with_every_solver(store, format, solver):
    words = [f"format={format}", f"solver={solver}", *QUICK.get(solver, [])]
    weight = WEIGHTS[format]
    settings = option("solver", solver)
    try:
        build({k: v for k, v in settings.items() if k != "name"}, "solver", Solver).check(weight)
    except ConfigError as refusal:  # of two lattices, or of zero points, by some solvers
        with pytest.raises(ConfigError, match=re.escape(str(refusal))):
            run(store, *words)
        return
    outcome = run(store, *words)
    assert not outcome.stored
    metrics = json.loads((outcome.run.path / "metrics.json").read_text())
    assert outcome.status == metrics["status"] == "done"
    assert {
        "run_id",
        "quant_id",
        "choices",
        "stages",
        "bits_per_weight",
        "seconds",
        "peak_memory_mb",
        "layers",
    } <= set(metrics)
    base, quantized = (metrics["stages"][stage] for stage in ("baseline", "quantized"))
    assert list(base["ppl"]) == ["pydoc"]
    assert base["tokens"] == 256
    assert 0 < divergence(metrics) < NEAR
    assert quantized["ppl"] != base["ppl"]
    assert len(metrics["layers"]) == 14
    # of format=auto, which may give a linear that hardly matters two bits, the mean
    errors = [layer["rel_error"] for layer in metrics["layers"]]
    error = fmean(errors) if format == "auto" else max(errors)
    assert min(errors) > 0
    assert error < 0.1 * 4.0 ** max(0, 4 - weight.bits), "a bit less is four times the noise"
    # a scale and a zero point of 32 bits are the most that a group has, and one scale a tensor
    most = weight.bits + 64 / weight.group(192) + 0.01
    assert weight.bits < metrics["bits_per_weight"] < most


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("transform", ["identity", "hadamard"])
def test_every_family(tmp_path, family, transform):
    signs = ["transform.random_signs=true"] if transform == "hadamard" else []
    int4 = ["format=int4", "format.weight.group_size=32"]
    outcome = run(tmp_path, f"model.family={family}", f"transform={transform}", *int4, *signs)
    assert outcome.status == "done", outcome.error
    assert outcome.metrics["notes"]["gate"]["max"] < 1e-4


def test_hadamard_keeps_the_function(tmp_path):
    outcome = run(
        tmp_path, "format=none", "solver=none", "transform=hadamard", "transform.block_size=full"
    )
    stages = outcome.metrics["stages"]
    assert stages["transformed"]["ppl"]["pydoc"] == pytest.approx(
        stages["baseline"]["ppl"]["pydoc"], rel=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_fold_is_stopped_by_the_gate(tmp_path, monkeypatch, dtype):
    """Paley matrices are not symmetric: absorbing R^T instead of R changes the model, and the run
    says so."""
    monkeypatch.setattr(
        Rotation, "absorb", lambda self, weight: self.matrix.apply_transpose(weight)
    )
    settings = [
        "format=none",
        "solver=none",
        "transform=hadamard",
        "transform.block_size=12",
        f"model.dtype={dtype}",
    ]
    outcome = run(tmp_path, *settings)
    assert outcome.status == "failed"
    assert "changed the model" in outcome.error
    assert outcome.run.status["status"] == "failed"
    monkeypatch.undo()
    mended = run(tmp_path, *settings)
    assert mended.status == "done"
    assert "error" not in mended.run.status


def test_untouched_model(tmp_path):
    metrics = run(tmp_path, "format=none", "solver=none").metrics
    assert list(metrics["stages"]) == ["baseline"]
    assert metrics["bits_per_weight"] == 32


@pytest.mark.parametrize(
    "unread",
    [
        "data.calibration.windows=200000",
        "data.calibration.length=8192",
        "data.calibration.path=nowhere.txt",
    ],
)
def test_calibration_settings_are_no_matter_where_nothing_calibrates(tmp_path, unread):
    plain, other = (
        run(tmp_path / name, "format=none", "solver=none", *own)
        for name, own in (("a", []), ("b", [unread]))
    )
    assert other.status == "done", other.error
    assert other.metrics["stages"] == plain.metrics["stages"]
    assert other.metrics["run_id"] == plain.metrics["run_id"]


def test_activations_alone_and_weights_alone(tmp_path):
    both = run(tmp_path, "format=nvfp4", "solver=rtn").metrics["stages"]["quantized"]["ppl"][
        "pydoc"
    ]
    weights = run(tmp_path, "format=nvfp4", "solver=rtn", "format.act.bits=16").metrics["stages"][
        "quantized"
    ]["ppl"]["pydoc"]
    acts = run(tmp_path, "format=nvfp4", "solver=none", "format.weight.bits=16").metrics["stages"][
        "quantized"
    ]["ppl"]["pydoc"]
    assert len({both, weights, acts}) == 3


OPTIONS = [
    "solver.sequencing=block",
    "solver.hessian_input=quantized",
    "solver.order=activation",
    "solver.scales=dynamic",
    "format.weight.observer=mse",
    "model.dtype=bfloat16",
    "model.amp=bfloat16",
    "data.calibration.order=random",
]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_runs_and_has_its_own_result(tmp_path, option):
    plain, other = run(tmp_path), run(tmp_path, option)
    assert other.status == "done", other.error
    assert other.metrics["run_id"] != plain.metrics["run_id"]
    assert (
        other.metrics["stages"]["quantized"]["ppl"] != plain.metrics["stages"]["quantized"]["ppl"]
    )


def test_stored_result_is_shown_and_force_computes_again(tmp_path):
    first = run(tmp_path)
    again = run(tmp_path)
    assert again.stored
    assert again.metrics == json.loads((first.run.path / "metrics.json").read_text())
    forced = run(tmp_path, "force=true")
    assert not forced.stored
    assert numbers(forced.metrics) == numbers(first.metrics)


def test_baseline_is_computed_once(tmp_path):
    run(tmp_path, "solver=rtn")
    shared = list((tmp_path / "runs" / "_shared" / "baselines").glob("*.json"))
    assert len(shared) == 1
    before = shared[0].stat().st_mtime_ns
    other = run(tmp_path, "solver=gptq")
    assert shared[0].stat().st_mtime_ns == before
    assert other.metrics["stages"]["baseline"]["tokens"] == 256


def test_other_evaluation_reuses_the_blocks(tmp_path):
    first = run(tmp_path)
    other = run(tmp_path, "eval.perplexity.windows=3")
    assert first.metrics["quant_id"] == other.metrics["quant_id"]
    assert first.metrics["run_id"] != other.metrics["run_id"]
    assert other.metrics["layers"] == first.metrics["layers"]
    events = [
        json.loads(line)["event"]
        for line in (other.run.path / "events.jsonl").read_text().splitlines()
    ]
    assert "block" not in events


@pytest.mark.parametrize("sequencing", ["sites", "block"])
@pytest.mark.parametrize("format", ["nvfp4", "int4", "mxfp4"])
def test_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, format, sequencing):
    settings = [f"format={format}", "transform=hadamard", f"solver.sequencing={sequencing}"]
    whole = run(tmp_path / "a", *settings)

    class Killed(Exception):
        pass

    settle, calls = BlockState.settle, []

    def dies_in_the_second_block(self, *args):
        calls.append(self.index)
        if len(calls) == 7:
            raise Killed
        return settle(self, *args)

    monkeypatch.setattr(BlockState, "settle", dies_in_the_second_block)
    assert run(tmp_path / "b", *settings).status == "failed"
    monkeypatch.undo()
    resumed = run(tmp_path / "b", *settings)
    assert not resumed.stored
    assert numbers(resumed.metrics) == numbers(whole.metrics)
    shutil.rmtree(tmp_path)


class Watching(GPTQ):
    """Keeps the Hessian of the first site it is asked to solve."""

    def solve_together(self, problems):
        self.__dict__.setdefault("first", problems[0].hessian.clone())
        return super().solve_together(problems)


@pytest.mark.parametrize(
    "act",
    [NVFP4(role="activation"), NVFP4(role="activation", scope="token")],
    ids=["tensor", "token"],
)
def test_a_calibration_text_is_quantized_without_its_neighbours(tmp_path, act):
    """H of two texts is the mean of H of each, whatever spans the scale of an activation."""
    ids = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))

    def hessian(name, windows):
        adapter, solver = Adapter(Tiny().load()[0]), Watching(hessian_input="quantized")
        swap(adapter)
        run = Store(tmp_path).run(name)
        run.start({}, {})
        blocks.quantize(
            adapter, Scheme(weight=NVFP4(), act=act), solver, windows, run, lambda *report: None
        )
        return solver.first

    both, one, other = hessian("both", ids), hessian("one", ids[:1]), hessian("other", ids[1:])
    assert (both - (one + other) / 2).abs().max() < 1e-6 * both.abs().max()


def test_force_computes_again_beside_a_sibling(tmp_path):
    """Another run with the same quantized model must not lend its blocks to a forced one."""
    run(tmp_path)
    run(tmp_path, "eval.perplexity.windows=3")
    forced = run(tmp_path, "force=true")
    events = [
        json.loads(line) for line in (forced.run.path / "events.jsonl").read_text().splitlines()
    ]
    assert [e["index"] for e in events if e["event"] == "block"] == [0, 1]


def test_damaged_block_is_solved_again(tmp_path):
    whole = run(tmp_path)
    block = whole.run.block(1)
    block.write_bytes(block.read_bytes()[:1000])
    os.remove(whole.run.path / "status.json")
    again = run(tmp_path)
    assert again.status == "done"
    assert numbers(again.metrics) == numbers(whole.metrics)


def test_infinite_perplexity_is_a_failure(tmp_path):
    settings = [
        "solver=rtn",
        "format=int4",
        "format.weight.symmetric=false",
        "format.weight.degenerate=one",
        "format.weight.incl0=never",
    ]
    model, tokenizer = Tiny().load()
    model.model.layers[1].mlp.up_proj.weight.data[3] = (
        0  # FP-Quant's rule: a constant group has zero point NaN
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for count in (2, 3):  # the second run finds the first one's blocks
        outcome = run(
            tmp_path,
            "model=hf",
            f"model.path={tmp_path / 'model'}",
            *settings,
            f"eval.perplexity.windows={count}",
        )
        assert outcome.status == "failed"
        assert "not finite" in outcome.error


def test_static_scale_is_that_of_the_solved_model(tmp_path):
    """What each site stores is the greatest magnitude it reads once the weights are quantized, in
    both sequencings."""
    for sequencing in ("sites", "block"):
        cfg, choices = small(tmp_path, f"solver.sequencing={sequencing}", "format.act.bits=16")
        outcome = execute(cfg, choices)
        model, tokenizer = Tiny().load()
        adapter = Adapter(model)
        swap(adapter)
        text = Pydoc().text("calibration")
        cut = windows(tokenize(tokenizer, text), 64, 6)
        scheme = Scheme(weight=NVFP4())
        blocks.quantize(adapter, scheme, GPTQ(), cut, outcome.run, lambda *_: None)
        seen = {}
        for site in adapter.sites(0):
            reader = adapter.blocks[1].get_submodule(site.linears[0])

            def keep(_, args, name=site.name, seen=seen):
                return seen.update({name: args[0].abs().amax()})

            reader.register_forward_pre_hook(keep)
        with torch.no_grad():
            model(cut)
        stored, _ = outcome.run.load_block(1)
        for name, amax in seen.items():
            assert stored[f"{name}.range"].abs().max().item() == pytest.approx(
                amax.item(), rel=1e-5
            )


def test_stream_is_the_forward_of_the_model():
    """Unequal micro-batches pass the blocks as the model itself does."""
    model, _ = Tiny(family="qwen3").load()
    adapter = Adapter(model)
    ids = torch.randint(256, (5, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        stream = Stream(adapter, ids, tokens_at_once=80)
        assert [len(hidden) for hidden in stream.hidden] == [2, 2, 1]
        for block in adapter.blocks:
            stream.advance(block)
        wanted = model(ids, output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(model.model.norm(torch.cat(stream.hidden)), wanted, atol=1e-5)


def test_a_walk_goes_through_the_sites_and_on_with_what_their_linears_become():
    """What a caller leaves unread still passes; a linear changed at its site computes what
    follows."""
    model, _ = Tiny().load()
    adapter = Adapter(model)
    ids = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(1))
    block, seen = adapter.blocks[0], {}
    with torch.no_grad():
        stream = Stream(adapter, ids, tokens_at_once=64)
        for site, activations in stream.walk(block):
            seen[site.name] = next(iter(activations)).clone()
            if site.name == "down_in":
                block.mlp.down_proj.weight.mul_(3)
        wanted = model(ids, output_hidden_states=True).hidden_states[1]
        block.mlp.down_proj.weight.div_(3)
        before = model(ids, output_hidden_states=True).hidden_states[1]
    assert list(seen) == [site.name for site in adapter.sites(0)]
    assert [x.shape[-1] for x in seen.values()] == [
        adapter.width(site) for site in adapter.sites(0)
    ]
    assert torch.allclose(torch.cat(stream.hidden), wanted, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=1e-3)


def test_statistics_hold_the_whole_hessian_the_range_and_every_other_row():
    x = torch.randn(700, 1000, generator=torch.Generator().manual_seed(2))
    statistics = Statistics(1000, 700, x.device, curvature=1000)
    for part in x.split(300):
        statistics.add(part)
    statistics.finish()
    assert torch.allclose(statistics.hessian, 2 / 700 * x.T @ x, atol=1e-4)
    assert statistics.range.tolist() == [x.min(), x.max()]
    assert torch.equal(statistics.sample, x[::2])


def test_two_texts_of_one_name_are_refused(tmp_path):
    folder = tmp_path / "pydoc"
    folder.mkdir()
    for part in ("train", "test"):
        (folder / f"{part}.txt").write_text(f"{part} words " * 500)
    cfg, choices = small(tmp_path, "data=text", f"data.path={folder}")
    with pytest.raises(ConfigError, match="two different texts"):
        execute(cfg, choices)


def test_calibrating_on_the_evaluated_text_is_refused(tmp_path):
    (tmp_path / "test.txt").write_text("evaluated " * 500)
    (tmp_path / "train.txt").write_text("calibrates " * 500)
    cfg, choices = small(
        tmp_path,
        "data=text",
        f"data.path={tmp_path}",
        f"data.calibration.path={tmp_path / 'test.txt'}",
    )
    with pytest.raises(ConfigError, match=r"data\.calibration\.path"):
        execute(cfg, choices)


SHORT = [f"Sample {n}: the quick brown fox is {n} years old." for n in range(8)]


@pytest.mark.parametrize(
    "options",
    [
        ["transform=pca"],
        ["solver=awq"],
        ["solver=adascale", "solver.iterations=2"],
        ["transform=spinquant", "transform.steps=1", "format.act.scope=tensor"],
    ],
    ids=str,
)
def test_a_few_short_samples_calibrate(tmp_path, options):
    """windows=null: a window of its own length, where the samples together do not fill one."""
    path = tmp_path / "seed.jsonl"
    own = [
        f"data.calibration.path={path}",
        "data.calibration.length=2048",
        "data.calibration.windows=null",
    ]

    def calibrated(samples, *more):
        path.write_text("\n".join(json.dumps({"text": sample}) for sample in samples))
        outcome = run(tmp_path, *options, *own, *more)
        assert outcome.status == "done", outcome.error
        return outcome.metrics

    first, packed = calibrated(SHORT), tokenize(Tiny().load()[1], SHORT)
    assert first["notes"]["calibration"] == f"1 x {len(packed)} tokens"
    cut = calibrated(SHORT, "data.calibration.length=64")
    assert cut["notes"]["calibration"] == f"{len(packed) // 64} x 64 tokens"
    other = calibrated([*SHORT, "One more."])
    assert len({run["quant_id"] for run in (first, cut, other)}) == 3


def test_as_many_windows_as_there_are_is_the_same_as_their_number(tmp_path):
    path = tmp_path / "seed.jsonl"
    path.write_text("\n".join(json.dumps({"text": sample}) for sample in SHORT))
    count = len(tokenize(Tiny().load()[1], SHORT)) // 64
    named, null = (
        run(tmp_path, f"data.calibration.path={path}", f"data.calibration.windows={n}").metrics
        for n in (count, "null")
    )
    assert null["stages"] == named["stages"]
    assert null["layers"] == named["layers"]
    assert "calibration" not in named["notes"]


def test_a_text_of_one_token_calibrates_nothing(tmp_path):
    (tmp_path / "own.txt").write_text("a")
    own = [f"data.calibration.path={tmp_path / 'own.txt'}", "data.calibration.windows=null"]
    with pytest.raises(
        DataError, match=r"data\.calibration\.length=2 tokens need 2 tokens, the text has only 1"
    ):
        run(tmp_path, *own)
    assert not any((tmp_path / "runs").glob("tiny*"))


def test_who_waits_for_a_run_that_is_refused_keeps_it_to_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    waits, holds, over = (threading.Event() for _ in range(3))
    cfg, choices = small(tmp_path)
    lock = tmp_path / "runs" / make_plan(settings(cfg), choices).run_id / "lock"

    def waiter():
        with locked(lock, wait=True, say=lambda _: waits.set()):
            (lock.parent / "status.json").write_text("mine")
            holds.set()
            over.wait(5)

    thread = threading.Thread(target=waiter)

    def refused(self):
        thread.start()
        assert waits.wait(5)
        raise DataError("no good")

    monkeypatch.setattr(Attempt, "_compute", refused)
    with pytest.raises(DataError, match="no good"):
        execute(cfg, choices)
    try:
        assert holds.wait(5)
        with pytest.raises(RunLocked), locked(lock):
            pass
        assert [path.name for path in lock.parent.parent.iterdir()] == [lock.parent.name]
        assert (lock.parent / "status.json").read_text() == "mine"
    finally:
        over.set()
        thread.join(5)


def test_home_folders_in_option_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    cfg, choices = small(tmp_path, "export=harness", "export.path='~/out'", "run_root='~/runs'")
    outcome = execute(cfg, choices)
    assert outcome.status == "done", outcome.error
    assert outcome.run.path.parent == tmp_path / "home" / "runs"
    assert Path(outcome.metrics["export"]["path"]).parent == tmp_path / "home" / "out"
    assert not (tmp_path / "~").exists()
    assert execute(cfg, choices).stored
    cfg.run_root = "~nobody-of-that-name/runs"
    with pytest.raises(ConfigError, match=r"\./~nobody-of-that-name"):
        execute(cfg, choices)


def test_two_writers(tmp_path):
    cfg, choices = small(tmp_path)
    done = execute(cfg, choices)
    os.remove(done.run.path / "status.json")
    with locked(done.run.path / "lock"), pytest.raises(RunLocked, match="another process"):
        execute(cfg, choices)


def test_nan_in_a_weight_names_the_tensor(tmp_path):
    model, tokenizer = Tiny().load()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    cfg, choices = small(tmp_path, "model=hf", f"model.path={tmp_path / 'model'}")
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        execute(cfg, choices)


def test_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    run(
        tmp_path,
        "transform=hadamard",
        "transform.random_signs=true",
        "data.calibration.order=random",
    )
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["format.weight.group_size=7"], ["format.weight.group_size"]),
        (["format=int4", "format.weight.group_size=100"], ["format.weight.group_size=100", "192"]),
        (["format.weight.bits=abc"], ["format.weight.bits", "abc"]),
        (["format.weight.symmetric=false"], ["symmetric"]),
        (["solver=none"], ["format.weight.bits", "solver"]),
        (["format=none"], ["format.weight.bits", "solver"]),
        (["solver.scales=dynamic", "solver.order=activation"], ["solver.scales", "solver.order"]),
        (["transform=hadamard", "transform.block_size=128"], ["transform.block_size=128", "64"]),
        (["seed=abc"], ["seed"]),
        (["device=gpu"], ["device=gpu"]),
        (["on_error=ignore"], ["on_error"]),
        (["data=text"], ["data.path"]),
        (["data=text", "data.path=/nowhere"], ["data.path=/nowhere"]),
        (["data.calibration.windows=0"], ["data.calibration.windows"]),
        (["eval.perplexity.length=100000"], ["eval.perplexity.length=100000"]),
        (["eval.perplexity.corpora=[pydok]"], ["pydok", "pydoc"]),
        (["model.dtype=float8"], ["model.dtype=float8"]),
        (["model.family=gpt2"], ["model.family=gpt2"]),
        (["model=hf", "model.path=/nowhere/at/all"], ["model.path"]),
        (["data.calibration.path=/nowhere.txt"], ["data.calibration.path"]),
        (["format.kv.bits=4", "format.kv.group_size=7"], ["format.kv.group_size"]),
        (["tracking.tags=a"], ["tracking.tags"]),
        (["device=cuda:99"], ["device=cuda:99"]),
        (["transform=hadamard", "transform.backend=fast"], ["transform.backend"]),
        (["transform=hadamard", "transform.block_size=6"], ["transform.block_size=6"]),
        (["data.calibration.windows=100000"], ["data.calibration.windows=100000"]),
        (["eval.perplexity.corpora=3"], ["eval.perplexity.corpora=3"]),
        (["eval.perplexity=3"], ["eval.perplexity=3"]),
        (["+format.foo=1"], ["format.foo"]),
        (["+export.foo=1"], ["export.foo"]),
        (["+foo=1"], ["foo"]),
        (["run_root=null"], ["run_root"]),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, overrides, names):
    cfg, choices = small(tmp_path, *overrides)
    with pytest.raises((ConfigError, DataError)) as caught:
        execute(cfg, choices)
    for name in names:
        assert name in str(caught.value)
    assert not (tmp_path / "runs").exists()
