"""Calibration on several texts: their windows in turn, each as a run on that text alone has it."""

import json
from pathlib import Path

import pytest
import torch
from composed import composed, small

from harness.calibration.shipped import Pydoc, Stdlib
from harness.calibration.subject import StreamedModel
from harness.calibration.windows import in_turn
from harness.config.build import settings
from harness.config.errors import ConfigError, DataError
from harness.models.adapter import Adapter
from harness.models.tiny import Tiny
from harness.pipeline import solving
from harness.pipeline.job import execute
from harness.pipeline.plan import make_plan
from harness.pipeline.texts import Windows
from harness.quantize import blocks
from harness.tune.scales import LearnedScales

RTN = ["format=int8", "format.act.range=static", "format.act.granularity=tensor", "solver=rtn"]


def text(number: int, count: int) -> torch.Tensor:
    """The windows [count, 2] of a text that is known by its number."""
    return torch.stack([torch.tensor([number, n]) for n in range(count)])


@pytest.mark.parametrize("texts", [1, 2, 3, 4])
@pytest.mark.parametrize("count", range(4, 12))
def test_windows_are_taken_in_turn_and_in_equal_shares(texts, count):
    shares = [share.count for share in Windows(count, 2).shares(texts)]
    mixed = in_turn([text(number, share) for number, share in enumerate(shares)])
    assert mixed.tolist() == [[n % texts, n // texts] for n in range(count)]
    for first in range(1, count + 1):
        found = torch.bincount(mixed[:first, 0], minlength=texts)
        assert found.max() - found.min() <= 1, "any first windows are a mixture"


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([5, 3], [0, 1, 0, 1, 0, 1, 0]), ([2, 9, 9], [0, 1, 2, 0, 1, 2]), ([3, 1, 2], [0, 1, 2, 0])],
)
def test_all_there_is_ends_with_the_first_text_that_has_no_more(lengths, expected):
    assert [share.count for share in Windows(None, 2).shares(len(lengths))] == [None] * len(lengths)
    mixed = in_turn([text(number, length) for number, length in enumerate(lengths)])
    assert mixed[:, 0].tolist() == expected


@pytest.mark.parametrize(("windows", "held"), [(6, 3), (7, 3), (30, 3), (50, 5)])
def test_each_text_is_learned_from_and_held_out(windows, held):
    model, _ = Tiny().load()
    ids = in_turn([text(number, share.count) for number, share in shares(windows, 3)])
    mixed = StreamedModel(Adapter(model), ids, texts=3)
    assert len(mixed.held) == held and torch.equal(torch.cat([mixed.train, mixed.held]), ids)
    for part in (mixed.train, mixed.held):
        assert part[:, 0].unique().tolist() == [0, 1, 2]


def shares(windows: int, texts: int):
    return enumerate(Windows(windows, 2).shares(texts))


def test_too_few_windows_serve_as_both():
    model, _ = Tiny().load()
    ids = in_turn([text(number, 1) for number in range(3)])
    subject = StreamedModel(Adapter(model), ids, texts=3)
    assert subject.train is ids and subject.held is ids


# runs


@pytest.fixture
def corpora(tmp_path):
    """A folder of texts besides the run's own: {name: folder}."""
    found = {}
    sources = {"code": Stdlib().text("calibration"), "verse": "A rose is a rose is a rose. " * 400}
    for name, content in sources.items():
        folder = tmp_path / "more" / name
        folder.mkdir(parents=True)
        (folder / "train.txt").write_text(content[:9000])
        (folder / "test.txt").write_text(f"Of {name}, what is evaluated.")
        found[name] = str(folder)
    return found


def calibrated(tmp_path, monkeypatch, *words):
    """(the windows that a run calibrates with, its outcome)."""
    seen, quantize = [], blocks.quantize

    def watching(adapter, scheme, solver, windows, *args, **kwargs):
        seen.append(windows)
        return quantize(adapter, scheme, solver, windows, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(solving.blocks, "quantize", watching)
        outcome = execute(*small(tmp_path, *RTN, *words))
    assert outcome.status == "done", outcome.error
    return (seen[0] if seen else None), outcome


def mixed(*names: str) -> str:
    return f"data.calibration.corpora=[{','.join(names)}]"


@pytest.mark.parametrize("order", ["first", "random"])
def test_every_window_is_that_of_a_run_on_its_text_alone(tmp_path, monkeypatch, corpora, order):
    words = ["data.calibration.windows=7", f"data.calibration.order={order}"]
    names = ["data", *corpora.values()]
    windows, outcome = calibrated(tmp_path, monkeypatch, *words, mixed(*names))
    alone = [calibrated(tmp_path, monkeypatch, *words, mixed(name))[0] for name in names]
    assert len(windows) == 7
    for n, window in enumerate(windows):
        assert torch.equal(window, alone[n % 3][n // 3])
    assert outcome.metrics["notes"]["calibration"] == "7 x 64 tokens of pydoc + code + verse"
    assert calibrated(tmp_path, monkeypatch, *words, mixed(*names))[1].stored


def test_all_there_is_of_a_short_text_is_a_window_of_each(tmp_path, monkeypatch, corpora):
    short = tmp_path / "short.txt"
    short.write_text("Eleven words of it.")
    windows, _ = calibrated(
        tmp_path,
        monkeypatch,
        "data.calibration.windows=null",
        f"data.calibration.path={short}",
        mixed(corpora["code"], "data"),
    )
    assert windows.shape[0] == 3 and windows.shape[1] < 64
    _, tokenizer = Tiny().load()
    assert tokenizer.decode(windows[1]) == short.read_text()


def test_the_marks_and_the_checkpoint_name_all_of_them(tmp_path, corpora):
    outcome = execute(
        *small(
            tmp_path,
            *RTN,
            mixed(corpora["verse"], "data"),
            "eval.perplexity.corpora=[data,stdlib]",
            "export=harness",
            f"export.path={tmp_path / 'out'}",
        )
    )
    assert outcome.status == "done", outcome.error
    marks = outcome.metrics["marks"]
    assert "same corpus as calibration" in marks["pydoc"]
    assert "same corpus as calibration" not in marks["stdlib"]
    folder = Path(outcome.metrics["export"]["path"])
    about = json.loads((folder / "quantization_metadata.json").read_text())
    assert about["calibration"]["corpus"] == "verse + pydoc"
    assert str(tmp_path) not in json.dumps(about["calibration"])


def plan(*words: str):
    cfg, choices = composed("model=tiny", "tracking=local", *words)
    return make_plan(settings(cfg), choices)


def test_one_text_is_what_it_was():
    """By default, and however it is named, a run is known by what it was known by."""
    text = Pydoc().fingerprint("calibration")
    usual = {"count": 32, "length": 512, "order": "first"}
    for words in ([], [mixed("data")], [mixed("pydoc")]):
        found = plan(*words)
        assert found._calibration() == [text, usual]
        assert (found.run_id, found.learned_id) == (plan().run_id, plan().learned_id)
    other = plan("data=stdlib", mixed("pydoc"))
    assert other._calibration() == [text, usual] and other.quant_id == plan().quant_id
    assert other.calibrated == ("pydoc",)


def test_the_texts_and_their_order_make_another_run():
    found = [plan(mixed(*names)) for names in (["data"], ["data", "stdlib"], ["stdlib", "data"])]
    for name in ("quant_id", "run_id", "learned_id"):
        assert len({getattr(each, name) for each in found}) == 3
    assert len({each.baseline_id for each in found}) == 1, "the untouched model reads none of them"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([mixed("data", "stdlibb")], r"corpora=stdlibb: .*Did you mean stdlib"),
        ([mixed("data", "./nowhere")], r"corpora=\./nowhere: .*is not a folder"),
        ([mixed("data", "pydoc")], r"\['data', 'pydoc'\]: pydoc is the text .*name it once"),
        ([mixed("stdlib", "stdlib")], "name it once"),
        (
            [mixed("data", "stdlib"), "data.name=stdlib", "eval.perplexity.corpora=[data]"],
            r"corpora: two different texts are called stdlib; set data\.name",
        ),
        ([mixed()], r"corpora=\[\]: needs at least one"),
        (["data.calibration.corpora=stdlib"], r"corpora=stdlib: needs a list, each a word or null"),
        (["data.calibration.corpora=[1]"], r"corpora=\[1\]: needs a list"),
        (
            [mixed("data", "stdlib"), "data.calibration.windows=1"],
            r"windows=1 with data\.calibration\.corpora=.*raise the first, or name fewer",
        ),
        (
            [mixed("stdlib"), "data.calibration.path=own.txt"],
            r"path=own\.txt with .*stands for `data`.*path=null",
        ),
    ],
)
def test_what_makes_no_mixture_is_refused_with_a_way_out(words, error):
    with pytest.raises((ConfigError, DataError), match=rf"data\.calibration\..*{error}"):
        plan(*words)


def test_a_share_that_a_text_is_too_short_for_is_refused_before_weights(tmp_path, corpora):
    (Path(corpora["verse"]) / "train.txt").write_text("A rose. " * 10)
    cfg, choices = small(tmp_path, *RTN, mixed("data", corpora["verse"]))
    told = r"corpora: the share of verse: data\.calibration\.windows=3 .* the text has 80 bytes"
    with pytest.raises(DataError, match=told):
        make_plan(settings(cfg), choices).check()


def test_an_evaluated_text_is_refused_among_others(tmp_path, corpora):
    cfg, choices = small(tmp_path, *RTN, mixed("data", corpora["verse"]))
    folder = Path(cfg.data.path)
    (Path(corpora["verse"]) / "train.txt").write_text((folder / "test.txt").read_text())
    with pytest.raises(ConfigError, match="data=verse calibrates with the text that is evaluated"):
        make_plan(settings(cfg), choices).check()


def test_a_tuner_is_held_to_each_text(tmp_path, monkeypatch):
    """As transforms are: the last tenth of six windows alone would be one of one text."""
    seen = []
    tune = LearnedScales.tune

    def watched(self, student):
        seen.append(student.model)
        return tune(self, student)

    monkeypatch.setattr(LearnedScales, "tune", watched)
    mixture = ["data.calibration.corpora=[data,stdlib]", "data.calibration.windows=6"]
    outcome = execute(
        *small(tmp_path, "tune=scales", "tune.windows=null", "tune.steps=1", "solver=rtn", *mixture)
    )
    assert outcome.status == "done", outcome.error
    (model,) = seen
    assert len(model.train) == 4 and len(model.held) == 2
