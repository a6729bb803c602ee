"""Distillation after solving: gradients against independent ones, a start that is the solved model,
an end that is what was learned, whatever the solver, the format, the transform."""

import json
import math
from dataclasses import replace

import pytest
import torch
import zoo
from composed import NEAR, ROOT, divergence, small
from preserved import exact_model, logits, token_ids

import harness
from harness.calibration.subject import StreamedModel
from harness.checkpoints.about import held
from harness.config.build import option, settings
from harness.config.errors import ConfigError
from harness.formats import FP4, MX, NVFP4, FourOverSix, Integer
from harness.models.adapter import Adapter
from harness.models.merge import swap
from harness.models.tiny import Tiny
from harness.pipeline import ids
from harness.pipeline.build import components
from harness.pipeline.job import execute
from harness.pipeline.plan import make_plan
from harness.report.settings import apart
from harness.transforms.learn import Teacher
from harness.tune import Student
from harness.tune.cells import rounded, within
from harness.tune.distill import Moving, floats, made
from harness.tune.scales import LearnedScales, Scaled
from harness.tune.weights import Master

F64 = torch.float64
TUNERS = sorted({path.stem for path in (ROOT / "conf" / "tune").glob("*.yaml")} - {"none"})
FORMATS = {
    "int4_channel": Integer(),
    "int4_group": Integer(granularity="group", group_size=16),
    "int4_asymmetric": Integer(granularity="group", group_size=16, symmetric=False),
    "int4_offset": Integer(symmetric=False, zp="float_offset"),
    "int3_tensor": Integer(bits=3, granularity="tensor"),
    "int4_bf16_scales": Integer(granularity="group", group_size=16, scale_dtype="bf16"),
    "fp4": FP4(group_size=16),
    "nvfp4": NVFP4(),
    "fouroversix": FourOverSix(),
    "mxfp4": MX(),
    "mxfp6": MX(bits=6, element="e3m2"),
}
# In the dtype of the weight throughout, with scales on no grid: what differences can be taken of.
SMOOTH = {
    "int4": Integer(granularity="group", group_size=16, compute_dtype="input", scale_dtype="input"),
    "int4_asymmetric": Integer(
        granularity="group",
        group_size=16,
        symmetric=False,
        compute_dtype="input",
        scale_dtype="input",
    ),
    "int4_offset": Integer(
        symmetric=False, zp="float_offset", compute_dtype="input", scale_dtype="input"
    ),
    "fp4": FP4(group_size=16, compute_dtype="input", scale_dtype="input"),
}
CODES = ("fixed", "rounded", "dual")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def solved(format, dtype=torch.float32, moved=0.0):
    """(w, what a solver made of it that saw it moved by so many standard deviations)."""
    weight = draw(6, 64, dtype=dtype) / 10
    return weight, format.quantize(weight + moved * draw(6, 64, seed=1, dtype=dtype) / 10)


def scaled(q, weight, codes):
    return Scaled(q, None if codes == "fixed" else within(weight, q), codes == "dual")


def shift(module, size=0.2, seed=2):
    """Move what is learned away from its start."""
    for index, parameter in enumerate(module.parameters()):
        noise = draw(*parameter.shape, seed=seed + index, dtype=parameter.dtype)
        parameter.data += size * noise
    return module


def lattice_of(format):
    """(values that codes stand for, in steps)."""
    if isinstance(format, FP4):
        positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=F64)
        return torch.cat([-positive.flip(0), positive])
    return torch.arange(format.qmin, format.qmax + 1, dtype=F64)


def lsq(format, weight, scale, zero):
    """LSQ's forward [rows, groups, group] by autograd alone: the nearest level of w / s, with the
    gradient of clamp, times s."""
    levels = lattice_of(format)
    offset = 0 if zero is None else zero.to(F64)[..., None]
    shifted = format.zp == "float_offset" if isinstance(format, Integer) else False
    x = (weight - offset if shifted else weight) / scale[..., None]
    code = x if shifted else x + offset
    nearest = levels[(code.detach()[..., None] - levels).abs().argmin(-1)]
    low, high = levels[0] - format.slack, levels[-1] + format.slack
    inside = (code >= low) & (code <= high)
    # rounded in value; what is clamped is a constant
    through = torch.where(inside, code + (nearest - code).detach(), nearest)
    return (
        (through * scale[..., None] + offset) if shifted else (through - offset) * scale[..., None]
    )


@pytest.mark.parametrize("name", SMOOTH)
def test_the_gradient_of_rounded_codes_is_lsqs(name):
    format = SMOOTH[name]
    weight, q = solved(format, F64)
    module = shift(scaled(q, weight, "rounded"))
    upstream = draw(6, 64, seed=3, dtype=F64)
    module().backward(upstream)
    exponent = module.post.detach().clone().requires_grad_()
    blocks = format.split(weight)
    value = lsq(format, blocks, q.scales.scale * exponent.exp(), q.scales.zero)
    assert torch.allclose(format.join(value, weight.shape), module(), rtol=1e-12, atol=1e-14)
    value.backward(format.split(upstream))
    assert torch.allclose(module.post.grad, exponent.grad, rtol=1e-10, atol=1e-12)
    clamped = value.detach().abs() < 0.95 * blocks.abs()
    assert clamped.any() and not clamped.all(), "both branches of the rule were asked"


@pytest.mark.parametrize("name", SMOOTH)
def test_it_is_the_difference_of_the_loss_with_the_rounding_held(name):
    """w / s + (Q(w / s) - w / s) with the bracket a constant, by central differences."""
    format = SMOOTH[name]
    weight, q = solved(format, F64)
    module = shift(scaled(q, weight, "rounded"), size=0.05)
    upstream = draw(6, 64, seed=3, dtype=F64)
    module().backward(upstream)
    at = module.post.detach()
    blocks = format.split(weight)
    zero = torch.zeros_like(at) if q.scales.zero is None else q.scales.zero.to(F64)
    shifted = isinstance(format, Integer) and format.zp == "float_offset"
    offset, zero = (zero[..., None], 0) if shifted else (0, zero[..., None])

    def levels(exponent):
        return (blocks - offset) / (q.scales.scale * exponent.exp())[..., None] + zero

    step = (q.scales.scale * at.exp())[..., None]
    codes = (format.split(module().detach()) - offset) / step + zero
    held = codes - levels(at)
    points = lattice_of(format)
    clamped = (levels(at) < points[0] - format.slack) | (levels(at) > points[-1] + format.slack)

    def loss(exponent):
        code = torch.where(clamped, codes, levels(exponent) + held)
        value = (code - zero) * (q.scales.scale * exponent.exp())[..., None] + offset
        return (format.split(upstream) * value).sum(-1)

    h = 1e-6
    difference = (loss(at + h) - loss(at - h)) / (2 * h)
    assert torch.allclose(module.post.grad, difference, rtol=1e-6, atol=1e-8)
    assert clamped.any()


@pytest.mark.parametrize("name", SMOOTH)
def test_the_gradient_of_fixed_codes_is_exact(name):
    format = SMOOTH[name]
    _, q = solved(format, F64)
    module = shift(scaled(q, None, "fixed"))
    upstream = draw(6, 64, seed=3, dtype=F64)
    module().backward(upstream)
    gradient = module.post.grad.clone()
    for index in range(min(5, gradient.numel())):
        values = []
        for h in (1e-6, -1e-6):
            module.post.data.view(-1)[index] += h
            values.append(float((module().detach() * upstream).sum()))
            module.post.data.view(-1)[index] -= h
        difference = (values[0] - values[1]) / 2e-6
        assert float(gradient.view(-1)[index]) == pytest.approx(difference, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", SMOOTH)
def test_two_scales_share_the_gradient_of_one(name):
    """Where both are equal, those of decoding and of rounding add up to LSQ's."""
    weight, q = solved(SMOOTH[name], F64)
    one = shift(scaled(q, weight, "rounded"))
    two = scaled(q, weight, "dual")
    two.post.data.copy_(one.post.data)
    two.pre.data.copy_(one.post.data)
    upstream = draw(6, 64, seed=3, dtype=F64)
    for module in (one, two):
        module().backward(upstream)
    assert torch.equal(one(), two())
    assert torch.allclose(two.post.grad + two.pre.grad, one.post.grad, rtol=1e-10, atol=1e-12)
    assert two.pre.grad.abs().max() > 0.01


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_learned_is_stored(name, codes):
    """The first value is the solved one; any later one is what its codes and scales decode to."""
    format = FORMATS[name]
    if isinstance(format, FourOverSix) and codes != "fixed":
        return  # refused
    weight, q = solved(format, moved=0.3)
    module = scaled(q, weight, codes)
    assert torch.equal(module(), q.dequantize())
    shift(module, size=0.5)
    stored = module.qtensor()
    assert torch.equal(module(), stored.dequantize())
    assert not torch.equal(stored.dequantize(), q.dequantize())
    assert stored.scales.scale.dtype == q.scales.scale.dtype
    assert stored.bits() == q.bits()
    assert torch.equal(stored.codes, q.codes) == (codes == "fixed")
    module().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", ["nvfp4", "fouroversix", "mxfp4", "int4_bf16_scales"])
def test_gradients_pass_the_grid_of_a_scale(name):
    """A stored scale is a constant of its cell, and learning goes on as if it were none."""
    _, q = solved(FORMATS[name])
    module = shift(scaled(q, None, "fixed"), size=0.1)
    upstream = draw(6, 64, seed=3)
    value = module()
    value.backward(upstream)
    wanted = FORMATS[name].split((upstream * value.detach()).double()).sum(-1)
    assert torch.allclose(module.post.grad.double(), wanted, rtol=1e-5, atol=1e-6)
    module.post.data += 1e-4
    assert (module() == value).float().mean() > 0.9


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_lies_in_the_cell_of_its_code(name):
    format = FORMATS[name]
    weight, q = solved(format, moved=0.3)
    found = within(weight, q)
    value = q.dequantize()
    assert torch.equal(rounded(found, format, q.scales, torch.float32), value)
    stays = rounded(weight, format, q.scales, torch.float32) == value
    assert torch.equal(found[stays], weight[stays])
    assert 0.05 < stays.float().mean() < 0.95
    assert ((found - value).abs() <= (weight - value).abs() * (1 + 1e-6) + 1e-7).all()
    # on the way, and not far from where the code changes: a little further it does
    further = found + 0.02 * (weight - value)
    changed = rounded(further, format, q.scales, torch.float32) != value
    assert changed[~stays].all()


@pytest.mark.parametrize("name", FORMATS)
def test_trained_weights_are_quantized_again(name):
    format = FORMATS[name]
    weight, q = solved(format, moved=0.3)
    module = Master(q, within(weight, q))
    assert torch.equal(module(), q.dequantize())
    upstream = draw(6, 64, seed=3)
    module().backward(upstream)
    assert torch.equal(module.weight.grad, upstream), "straight through"
    shift(module, size=0.05)
    wanted = format.quantize(module.weight.detach(), scales=q.scales)
    assert torch.equal(module(), wanted.dequantize())
    assert torch.equal(module.qtensor().codes, wanted.codes)
    assert not torch.equal(wanted.codes, q.codes)
    (rate,) = module.rates().values()
    assert rate == pytest.approx(float(module.weight.detach().square().mean().sqrt()))


def test_a_step_of_adam_is_relative():
    """The first one is the rate, whatever the gradient; its decay is a cosine's."""
    free = torch.zeros(3, requires_grad=True)
    moving = Moving({"a": (free, 1e-3)}, 4)
    for step in range(4):
        free.grad = torch.tensor([1e-4, -7.0, 1e3])
        before = free.detach().clone()
        moving.step()
        wanted = 1e-3 * (1 + math.cos(math.pi * step / 4)) / 2
        assert torch.allclose((free - before).abs(), torch.full((3,), wanted), rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_gain_moves_by_a_share_of_itself(family):
    """A gain of a ten-thousandth holds down a channel ten thousand times as large; gemma's are
    1 + w."""
    added = int(family == "gemma")
    adapter = Adapter(zoo.make("gemma") if added else Tiny().load()[0])
    norm = next(name for name, role in adapter.roles.items() if role.kind == "norm")
    weight = adapter.model.get_submodule(norm).weight
    with torch.no_grad():
        weight[:4] = torch.tensor([1e-4, -1e-4, 0.0, 3.0]) - added
    before = weight.detach().clone() + added
    gain = floats(adapter)[f"{norm}.weight"]
    assert torch.equal(gain.served(), weight)
    moving = Moving({"gain": (gain.free, 0.01)}, 10)
    gain.free.grad = torch.ones_like(gain.free)
    moving.step()
    moved = gain.served() + added
    assert ((moved - before).abs() <= 0.0101 * before.abs() + 1e-7).all()
    assert (moved[3] / before[3]).item() == pytest.approx(math.exp(-0.01), rel=1e-5)
    assert moved[2] == before[2]


def run(tmp_path, *overrides):
    quick = {
        name: ["tune.steps=4", "tune.windows=null"]
        for name in TUNERS
        if "steps" in option("tune", name)
    }
    chosen = next((o.partition("=")[2] for o in overrides if o.startswith("tune=")), None)
    return execute(*small(tmp_path, "solver=rtn", *quick.get(chosen, []), *overrides))


def tuned(outcome):
    """{file: its bytes} of what a tuner left."""
    return {
        path.name: path.read_bytes()
        for path in outcome.run.path.glob("blocks/[0-9]*.*.safetensors")
    }


def events(outcome, name):
    lines = (outcome.run.path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


LEARNERS = [
    ["tune=scales"],
    ["tune=scales", "tune.norms=false", "tune.lr=0.01"],
    ["tune=scales", "tune.codes=rounded", "tune.lr=0.01"],
    ["tune=scales", "tune.codes=dual", "tune.lr=0.01"],
    ["tune=weights"],
    ["tune=weights", "tune.norms=false", "tune.lr=0.001"],
]


@pytest.mark.parametrize("options", LEARNERS, ids=str)
def test_the_divergence_falls(tmp_path, options):
    outcome = run(tmp_path, *options, "tune.steps=24", "eval.perplexity.windows=8")
    assert outcome.status == "done", outcome.error
    before, after = outcome.metrics["notes"]["tune_held_out"]
    assert after < 0.97 * before
    plain = run(tmp_path, "eval.perplexity.windows=8")
    kl = [o.metrics["stages"]["quantized"]["divergence"]["pydoc"]["kl"] for o in (plain, outcome)]
    assert kl[1] < kl[0], "on texts that nothing was chosen by, too"


def test_the_best_iterate_is_taken(tmp_path):
    """A rate that only does harm leaves the solved model, and says so."""
    outcome = run(tmp_path, "tune=scales", "tune.lr=1", "tune.lr_norms=1")
    plain = run(tmp_path)
    assert outcome.metrics["notes"]["tune_best_step"] == 0
    assert any("tune=scales changed nothing" in w for w in outcome.metrics["warnings"])
    assert outcome.metrics["stages"]["quantized"] == plain.metrics["stages"]["quantized"]


@pytest.mark.parametrize(("windows", "last"), (("null", 5), (4, 9)))
def test_the_held_out_loss_is_the_divergence_of_what_is_served(tmp_path, windows, last):
    """In float64, between the untouched model and the exported one, on the last window: of those
    that were solved with, or of as many more after them."""
    export = ["export=harness", f"export.path={tmp_path / 'out'}", "transform=quarot"]
    options = ["tune=scales", "format=w4a4kv4", "format.weight.group_size=32"]
    options.append(f"tune.windows={windows}")
    outcome = run(tmp_path, *options, *export, "transform.r1=12")
    assert outcome.status == "done", outcome.error
    student, tokenizer = harness.load(outcome.metrics["export"]["path"])
    text = (tmp_path / "text" / "train.txt").read_text()
    held = torch.tensor(tokenizer(text).input_ids)[last * 64 : (last + 1) * 64][None]
    with torch.no_grad():
        p = Tiny().load()[0](held).logits.double().log_softmax(-1)
        q = student(held, use_cache=False).logits.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert outcome.metrics["notes"]["tune_held_out"][1] == pytest.approx(kl, rel=1e-4)


def test_windows_of_its_own_leave_what_is_solved(tmp_path):
    options = ["tune=scales", "solver=gptq", "data.calibration.order=random"]
    own = run(tmp_path, *options, "tune.windows=3")
    shared = run(tmp_path, *options)
    assert own.run.path != shared.run.path
    assert events(own, "block") and not events(shared, "block")
    with pytest.raises(ConfigError, match=r"tune\.windows=3"):
        run(tmp_path, *options, "tune.windows=3", "data.calibration.windows=null")


def test_without_a_tuner_nothing_is_another_run(tmp_path, monkeypatch):
    def plan(*overrides):
        cfg, choices = small(tmp_path, *overrides)
        return make_plan(settings(cfg), choices)

    none, scales, weights = (plan(f"tune={name}") for name in ("none", "scales", "weights"))
    shorter = plan("tune=scales", "tune.steps=7")
    plans = (none, scales, weights, shorter)
    assert len({p.quant_id for p in plans}) == len({p.baseline_id for p in plans}) == 1
    assert len({p.run_id for p in plans}) == len({p.tune_id for p in plans}) == 4
    assert none.tune_id == ""
    monkeypatch.setattr(ids, "of_tune", lambda section: [])  # as before there was the setting
    assert plan("tune=none").run_id == none.run_id


def test_what_was_tuned_is_found_and_what_was_solved_is_kept(tmp_path):
    plain = run(tmp_path)
    first = run(tmp_path, "tune=scales")
    assert events(first, "block") == [], "the blocks are those of the run without"
    again = run(tmp_path, "tune=scales", "eval.perplexity.windows=3")
    other = run(tmp_path, "tune=scales", "tune.steps=3")
    assert [events(o, "tune")[0]["source"] for o in (first, again, other)] == [
        "tuned",
        "store",
        "tuned",
    ]
    assert tuned(again) == tuned(first)
    for outcome in (first, again, other):
        for index in range(2):
            mine, theirs = outcome.run.block(index), plain.run.block(index)
            assert mine.read_bytes() == theirs.read_bytes()
    assert run(tmp_path, "tune=scales").stored
    forced = run(tmp_path, "tune=scales", "force=true")
    assert events(forced, "tune")[-1]["source"] == "tuned"
    assert forced.metrics["stages"] == first.metrics["stages"]


def test_a_damaged_part_is_tuned_again(tmp_path):
    whole = run(tmp_path, "tune=scales")
    wanted = tuned(whole)
    path = next(whole.run.path.glob("blocks/0001.*.safetensors"))
    path.write_bytes(path.read_bytes()[:1000])
    (whole.run.path / "status.json").unlink()
    again = run(tmp_path, "tune=scales")
    assert again.metrics["stages"] == whole.metrics["stages"]
    assert tuned(again) == wanted


@pytest.mark.parametrize("options", LEARNERS[2::2], ids=str)
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch, options):
    options = [*options, "tune.steps=16"]
    whole = run(tmp_path / "whole", *options)
    steps = []
    step = Moving.step

    def killed(self):
        steps.append(self.taken)
        if len(steps) == 8:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Moving, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", *options)
    again = run(tmp_path / "killed", *options)
    assert steps[8:] == list(range(6, 16)), "from the last held-out loss"
    assert tuned(again) == tuned(whole)
    assert again.metrics["stages"] == whole.metrics["stages"]
    assert again.metrics["notes"] == whole.metrics["notes"]
    assert list(again.run.path.glob("blocks/tune.*")) == []


FORMAT_OPTIONS = {
    "nvfp4": [],
    "mxfp4": [],
    "fouroversix": [],
    "int4": ["format.weight.group_size=32"],
    "fp4": [],
    "w4a8kv8": ["format.weight.group_size=32"],
}


@pytest.mark.parametrize("format", FORMAT_OPTIONS)
@pytest.mark.parametrize("tuner", TUNERS)
def test_every_tuner_with_every_format_solver_and_transform(tmp_path, tuner, format):
    exported = ["export=harness", f"export.path={tmp_path / 'out'}"]
    for solver, transform in (("rtn", "hadamard"), ("gptq", "quarot")):
        outcome = run(
            tmp_path,
            f"tune={tuner}",
            f"format={format}",
            f"solver={solver}",
            f"transform={transform}",
            *FORMAT_OPTIONS[format],
            *exported,
        )
        assert outcome.status == "done", outcome.error
        assert 0 < divergence(outcome.metrics) < NEAR
        for evaluated, loaded in outcome.metrics["export"]["ppl"].values():
            assert evaluated == pytest.approx(loaded, rel=1e-9)
        assert outcome.metrics["export"]["weights"] == 14


@pytest.mark.parametrize(
    "options",
    [
        ["solver=awq", "solver.grid=3"],
        ["solver=adascale", "solver.iterations=2"],
        ["solver=minmax"],
        ["transform=adacodec", "transform.steps=2"],
        ["format=auto"],
        ["format.overrides={lm_head: int8, embed_tokens: int8, down_proj: 16}"],
        ["model.tie=false"],
        ["model.family=qwen3"],
        ["model.family=qwen2", "format.kv.bits=4"],
        ["model.dtype=bfloat16"],
        ["model.amp=bfloat16"],
        ["data.calibration.windows=1"],
        ["data.calibration.activations=disk"],
    ],
    ids=str,
)
@pytest.mark.parametrize("codes", ["fixed", "rounded"])
def test_what_else_a_run_may_be(tmp_path, options, codes):
    plain = ["format=int4", "format.weight.group_size=32"]
    if any(o.startswith("format=") for o in options):
        plain = []
    outcome = run(tmp_path, *plain, *options, "tune=scales", f"tune.codes={codes}")
    assert outcome.status == "done", outcome.error
    assert 0 < outcome.metrics["notes"]["tune_held_out"][1] < NEAR
    assert 0 < divergence(outcome.metrics) < NEAR


def test_a_mixture_is_tuned_expert_by_expert(tmp_path):
    zoo.make("mixtral").save_pretrained(tmp_path / "model")
    Tiny().load()[1].save_pretrained(tmp_path / "model")
    model = ["model=hf", f"model.path={tmp_path / 'model'}"]
    export = ["export=harness", f"export.path={tmp_path / 'out'}"]
    for options in (["tune=scales"], ["tune=weights"]):
        outcome = run(tmp_path, *model, *options, *export)
        assert outcome.status == "done", outcome.error
        before, after = outcome.metrics["notes"]["tune_held_out"]
        assert after < before
        for evaluated, loaded in outcome.metrics["export"]["ppl"].values():
            assert evaluated == pytest.approx(loaded, rel=1e-9)


def test_what_stays_stays(tmp_path):
    """Embedding and head, which share a matrix; norms move, and only where they are told to."""
    for norms in ("true", "false"):
        outcome = run(
            tmp_path,
            "tune=scales",
            f"tune.norms={norms}",
            "export=harness",
            f"export.path={tmp_path / norms}",
        )
        loaded = dict(harness.load(outcome.metrics["export"]["path"])[0].named_parameters())
        untouched = dict(Tiny().load()[0].named_parameters())
        name = "model.embed_tokens.weight"
        assert torch.equal(loaded[name], untouched[name])
        moved = {
            name
            for name, values in untouched.items()
            if "norm" in name and not torch.equal(values, loaded[name])
        }
        assert len(moved) == (5 if norms == "true" else 0)


def test_it_is_exported_to_others_as_it_was_evaluated(tmp_path):
    options = ["tune=scales", "tune.lr=0.02", "model.dtype=bfloat16"]
    outcome = run(
        tmp_path, *options, "export=compressed_tensors", f"export.path={tmp_path / 'out'}"
    )
    assert outcome.status == "done", outcome.error
    exported = outcome.metrics["export"]
    assert exported["weights"] == 14
    assert exported["name"] == "tiny-llama-RTN.Scales_wnvfp4_g16_anvfp4_kv16_headfp16"
    about = json.loads((ROOT / exported["path"] / "quantization_metadata.json").read_text())
    assert about["method"]["tune"] == "scales"
    assert held(ROOT / exported["path"])["tune"] == "scales"


def test_encodings_are_those_of_the_tuned_weights(tmp_path):
    int4 = ["format=int4", "format.act.bits=16", "solver=minmax"]
    plain, other = run(tmp_path, *int4), run(tmp_path, *int4, "tune=scales", "tune.lr=0.02")
    texts = [
        sorted(path.read_text() for path in (o.run.path / "min_max_encodings").iterdir())
        for o in (plain, other)
    ]
    assert len(texts[0]) == len(texts[1]) and texts[0] != texts[1]


def test_figures_of_the_text_it_was_trained_on_are_marked(tmp_path):
    assert "adapted" in run(tmp_path, "tune=scales").metrics["marks"]["pydoc"]
    assert "adapted" not in run(tmp_path).metrics["marks"]["pydoc"]


def test_curves_are_logged(tmp_path):
    outcome = run(tmp_path, "tune=scales")
    lines = (outcome.run.path / "tracking" / "curves.jsonl").read_text().splitlines()
    points = [point for point in map(json.loads, lines) if "tune/loss" in point]
    assert [point["step"] for point in points] == [1, 2, 3, 4]
    held = [point["tune/held_out"] for point in points]
    first, least = outcome.metrics["notes"]["tune_held_out"]
    assert min(first, *held) == least


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["tune=scales", "solver=none", "format=none"], ["tune=scales", "solver=rtn"]),
        (["tune=weights", "solver=none", "format.weight.bits=16"], ["tune=weights", "tune=none"]),
        (["tune=scales", "tune.codes=free"], ["tune.codes=free", "fixed, rounded, dual"]),
        (["tune=scales", "tune.steps=-1"], ["tune.steps=-1"]),
        (["tune=scales", "tune.batch=0"], ["tune.batch=0"]),
        (["tune=scales", "tune.lr=2"], ["tune.lr=2"]),
        (["tune=weights", "tune.norms=1"], ["tune.norms=1"]),
        (["tune=scales", "+tune.lrr=1"], ["tune.lrr", "lr"]),
        (["+tune.steps=1"], ["tune.steps"]),
        (
            ["tune=scales", "tune.codes=rounded", "format=fouroversix"],
            ["tune.codes=rounded", "FourOverSix", "tune.codes=fixed"],
        ),
    ],
    ids=str,
)
def test_what_cannot_be_tuned_is_refused(tmp_path, options, words):
    with pytest.raises(ConfigError) as refused:
        execute(*small(tmp_path, "solver=rtn", *options))
    assert all(word in str(refused.value) for word in words), refused.value
    assert not (tmp_path / "runs").exists()


def test_blocks_on_disk_are_refused(tmp_path):
    model, tokenizer = Tiny().load()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    disk = ["model=hf", f"model.path={tmp_path / 'model'}", "model.weights=disk"]
    with pytest.raises(ConfigError, match=r"tune=scales with model\.weights=disk"):
        run(tmp_path, *disk, "tune=scales")


def test_a_rate_that_reaches_no_other_scale_is_told():
    formats = [MX(), NVFP4(), Integer()]
    assert len(LearnedScales(lr=1e-3, steps=200).check(formats)) == 1
    assert "MX" in LearnedScales(lr=1e-3, steps=200).check(formats)[0]
    assert LearnedScales(lr=5e-3, steps=200).check(formats) == []
    assert len(LearnedScales(lr=1e-4, steps=200).check(formats)) == 2


def test_what_is_switched_off_is_not_read(tmp_path):
    cfg, choices = small(tmp_path, "tune=scales", "tune.norms=false", "solver=rtn")
    given = ("tune.norms", "tune.lr_norms", "tune.steps")
    told = components(replace(make_plan(settings(cfg), choices), given=given)).warnings
    assert told == ["tune.lr_norms has no effect with LearnedScales as it is set"]


@pytest.mark.parametrize("codes", ["fixed", "dual"])
def test_the_gradient_of_the_divergence_is_its_difference(codes):
    """Through the whole model in float64, in one direction of the scales of two linears."""
    adapter, untouched = exact_model("llama"), exact_model("llama")
    swap(adapter)
    windows = token_ids(2)
    teacher = Teacher(StreamedModel(untouched, windows))
    student = Student(StreamedModel(adapter, windows), {}, {}, teacher, None, Nowhere())
    modules = {}
    for name in (adapter.name(0, "self_attn.q_proj"), adapter.name(1, "mlp.down_proj")):
        weight = adapter.model.get_submodule(name).weight
        modules[f"{name}.weight"] = scaled(SMOOTH["int4"].quantize(weight), weight, codes)
    # codes that are made by a scale of their own are constants here: only decoding moves smoothly
    moving = [module.post for module in modules.values()]
    ways = [draw(*each.shape, seed=7, dtype=F64) for each in moving]

    def divergence():
        p, q = (logits(each, windows[:1]).log_softmax(-1) for each in (untouched, adapter))
        return float((p.exp() * (p - q)).sum(-1).mean())

    with torch.enable_grad(), made(adapter, modules):
        loss = student.loss(windows[:1], again=False)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(divergence(), rel=1e-5)
        slope = float(sum((each.grad * way).sum() for each, way in zip(moving, ways)))
        values = []
        for h in (1e-4, -2e-4):
            for each, way in zip(moving, ways):
                each.data += h * way
            values.append(divergence())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-4)


class Nowhere:
    """Keeps nothing."""

    def load(self):
        return None

    def save(self, tensors, values):
        pass


def test_a_tuned_run_is_told_apart():
    """From runs of before there was the choice, too, which are those without a tuner."""
    choices = [{"solver": "rtn"}, {"solver": "rtn", "tune": "none"}]
    rows = [{"choices": each} for each in (*choices, {"solver": "rtn", "tune": "scales"})]
    assert apart(rows, [{"seed": "0"}] * 3) == ["", "", "tune=scales"]
