import json
import subprocess
import sys

import pytest
import torch

from harness.calibration.corpus import PARTS, HubText, TextFolder
from harness.calibration.samples import Samples
from harness.calibration.shipped import Pydoc, Stdlib
from harness.calibration.windows import tokenize, windows
from harness.config.errors import ConfigError, DataError
from harness.models.tiny import byte_tokenizer


def folder(path, **texts):
    for name, text in texts.items():
        (path / f"{name}.txt").write_bytes(text.encode())
    return TextFolder(str(path))


# corpora


def test_pydoc_parts_are_the_whole_text_cut_once_between_topics():
    from pydoc_data.topics import topics

    corpus = Pydoc()
    corpus.check()
    calibration, evaluation = corpus.text("calibration"), corpus.text("evaluation")
    assert f"{calibration}\n\n{evaluation}" == "\n\n".join(topics[key] for key in sorted(topics))
    assert 0.7 < len(calibration) / len(calibration + evaluation) < 0.8


def test_pydoc_is_long_enough_for_the_default_windows():
    corpus = Pydoc()
    # 16,384 tokens each are the defaults; five characters a token is more than any usual tokenizer
    # takes on this text
    assert min(len(corpus.text(part)) for part in ("calibration", "evaluation")) > 5 * 16_384


def test_folder_is_read_unmodified_and_valid_stands_in_for_train(tmp_path):
    text = "one\r\n\n  two \t\u00e9\u4e2d\U0001f600\n"
    corpus = folder(tmp_path, valid=text, test="held out")
    corpus.check()
    assert corpus.text("calibration") == text and corpus.text("evaluation") == "held out"
    assert corpus.name == tmp_path.name
    folder(tmp_path, train="more")
    assert corpus.text("calibration") == "more"


def test_fingerprint_follows_the_text_of_its_part(tmp_path):
    texts = [("a", "b"), ("ab", "b"), ("ab", "c"), ("a", "a")]
    marks = [
        [folder(tmp_path, train=train, test=test).fingerprint(part) for part in PARTS]
        for train, test in texts
    ]
    calibration, evaluation = zip(*marks)
    assert calibration[0] == calibration[3] != calibration[1] == calibration[2]
    assert evaluation[0] == evaluation[1] != evaluation[2] != evaluation[3]
    assert calibration[3] == evaluation[3], "one text, one fingerprint, whatever it is used for"


def test_hub_fingerprint_names_the_split():
    test, validation = (HubText("a/b", "c", split) for split in ("test", "validation"))
    assert test.fingerprint("evaluation") != validation.fingerprint("evaluation")
    assert test.fingerprint("calibration") == validation.fingerprint("calibration")


@pytest.mark.parametrize(
    "texts, error",
    [
        ({}, "train.txt or valid.txt"),
        ({"train": "a"}, "test.txt"),
        ({"train": "a", "test": " \n\t\n"}, "no text"),
    ],
)
def test_a_folder_without_text_is_refused(tmp_path, texts, error):
    with pytest.raises(DataError, match=rf"data\.path.*{error}"):
        folder(tmp_path, **texts).check()


def test_a_missing_folder_and_a_missing_setting_are_told_apart(tmp_path):
    nowhere, unset = TextFolder(str(tmp_path / "nowhere")), TextFolder(None)
    for act in ("check", "fingerprint"):
        part = () if act == "check" else ("evaluation",)
        with pytest.raises(DataError, match=r"data\.path=.*nowhere is not a folder"):
            getattr(nowhere, act)(*part)
        with pytest.raises(ConfigError, match=r"data=text needs data\.path=DIR"):
            getattr(unset, act)(*part)
    with pytest.raises(DataError, match=r"data\.calibration\.path=.*is not a file"):
        Samples(str(tmp_path / "none.txt")).fingerprint("calibration")


def test_text_that_is_not_utf8_is_refused(tmp_path):
    corpus = folder(tmp_path, train="a", test="b")
    (tmp_path / "test.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"test\.txt is not UTF-8"):
        corpus.text("evaluation")


def test_samples_from_lines_and_from_text(tmp_path):
    plain, lines = tmp_path / "own.txt", tmp_path / "own.jsonl"
    plain.write_text("whole\ntext")
    lines.write_text(
        "\n".join(json.dumps({"text": text}) for text in ("first\u2028one", "second")) + "\n"
    )
    assert Samples(str(plain)).text("calibration") == "whole\ntext"
    Samples(str(lines)).check()
    assert Samples(str(lines)).text("calibration") == ["first\u2028one", "second"]
    with pytest.raises(ConfigError, match="only calibrates"):
        Samples(str(plain)).text("evaluation")


@pytest.mark.parametrize(
    "content", ['{"prompt": "a"}', "not json", '{"text": 3}', '["text"]', "\n \n", '{"text": " "}']
)
def test_bad_samples_are_refused(tmp_path, content):
    path = tmp_path / "own.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"data\.calibration\.path"):
        Samples(str(path)).check()


def test_hub_text_offline_and_not_cached_is_refused_with_a_way_out(monkeypatch, tmp_path):
    from datasets import config

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path))
    corpus = HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test", name="wikitext2")
    for act in (corpus.check, lambda: corpus.text("evaluation")):
        with pytest.raises(
            DataError, match=r"OFFLINE is set.*data=pydoc, or data=text data\.path=DIR"
        ):
            act()


def test_hub_text_is_read_from_the_local_cache(monkeypatch, tmp_path):
    from datasets import DatasetInfo, Features, SplitDict, SplitInfo, Value, config
    from datasets.arrow_writer import ArrowWriter

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path))
    home = tmp_path / "someone___prose" / "small" / "0.0.0" / "abc"
    home.mkdir(parents=True)
    features, rows, splits = (
        Features(text=Value("string")),
        {"train": ["a", "", "b"], "test": ["c", "d", "e"]},
        SplitDict(),
    )
    for split, texts in rows.items():
        with ArrowWriter(path=str(home / f"prose-{split}.arrow"), features=features) as writer:
            for text in texts:
                writer.write({"text": text})
            writer.finalize()
        splits.add(SplitInfo(name=split, num_examples=len(texts)))
    DatasetInfo(
        features=features, splits=splits, config_name="small", dataset_name="prose"
    ).write_to_directory(str(home))

    corpus = HubText("someone/prose", "small", "test")
    corpus.check()
    assert corpus.text("calibration") == "a\n\n\n\nb" and corpus.text("evaluation") == "c\n\nd\n\ne"
    assert HubText("someone/prose", "small", "test", documents=2).text("evaluation") == "c\n\nd"


def test_a_set_of_one_split_evaluates_on_what_follows_and_conversations_are_what_is_said(
    monkeypatch, tmp_path
):
    from datasets import Dataset

    turns = [
        {
            "topic": f"t{n}",
            "said": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}],
        }
        for n in range(5)
    ]
    rows = Dataset.from_list(turns)
    names = {"columns": ["topic", "said"], "calibration_split": "one", "documents": 2}
    corpus = HubText("someone/talk", "small", None, **names)
    asked = []
    monkeypatch.setattr(HubText, "_rows", lambda self, split: asked.append(split) or rows)
    assert corpus.text("calibration") == "t0\n\nq0\n\na\n\nt1\n\nq1\n\na"
    assert corpus.text("evaluation") == "t2\n\nq2\n\na\n\nt3\n\nq3\n\na"
    assert asked == ["one", "one"]
    assert corpus.fingerprint("calibration") == "someone/talk/small@main/one[:2]/topic+said"
    assert corpus.fingerprint("evaluation") == "someone/talk/small@main/one[2:4]/topic+said"
    values = [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]
    rows = Dataset.from_list([{"system": "", "said": values}])
    other = HubText("a/b", "c", None, columns=["system", "said"], documents=1)
    assert other.text("calibration") == "why\n\nso"
    with pytest.raises(DataError, match="no text in its column topic; it has system, said"):
        corpus.text("calibration")


def test_fingerprints_of_a_set_that_has_both_splits_stay():
    whole = HubText("a/b", "c", "test")
    assert [whole.fingerprint(part) for part in PARTS] == ["a/b/c@main/train", "a/b/c@main/test"]
    some = HubText("a/b", "c", "validation", documents=2000, revision="v1")
    marks = [some.fingerprint(part) for part in PARTS]
    assert marks == ["a/b/c@v1/train[:2000]", "a/b/c@v1/validation[:2000]"]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"evaluation_split": None}, r"documents=null with data\.evaluation_split=null"),
        ({"evaluation_split": "test", "columns": []}, r"data\.columns=\[\]"),
        ({"evaluation_split": "test", "calibration_split": None}, r"calibration_split=None"),
        (
            {"evaluation_split": "test", "documents": 0},
            r"data\.documents=0: .*at least 1 or null\.",
        ),
    ],
)
def test_a_set_that_cannot_be_read_so_is_refused(settings, error):
    with pytest.raises(ConfigError, match=error):
        HubText("a/b", "c", **settings)


def test_the_sources_of_the_library_are_there_whole():
    corpus = Stdlib()
    calibration, evaluation = (corpus.text(part) for part in PARTS)
    assert len(evaluation) > 300_000 and 2 < len(calibration) / len(evaluation) < 4
    assert "class ArgumentParser" in calibration and "class ZipFile" in evaluation


def test_fingerprints_need_no_torch():
    code = (
        "import sys; "
        "from harness.calibration.corpus import HubText; "
        "from harness.calibration.shipped import Pydoc; "
        "from harness.models.hub import Hub; "
        "from harness.models.tiny import Tiny; "
        "Pydoc().fingerprint('evaluation'), Tiny().fingerprint(); "
        "HubText('a/b', 'c', 'test').fingerprint('evaluation'), Hub(path='a/b').fingerprint(); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# windows


def test_first_windows_lie_side_by_side_and_the_tail_is_dropped():
    tokens = torch.arange(23)
    assert torch.equal(windows(tokens, 5, None), torch.arange(20).view(4, 5))
    assert torch.equal(windows(tokens, 5, 2), torch.arange(10).view(2, 5))
    assert windows(tokens, 23, None).shape == (1, 23)


def test_random_windows_are_pieces_of_the_text_and_follow_the_seed():
    tokens, state = torch.arange(1000) * 3, torch.random.get_rng_state()
    drawn = windows(tokens, 7, 50, order="random", seed=1)
    assert drawn.shape == (50, 7) and (drawn.diff(dim=1) == 3).all()
    assert drawn[:, 0].unique().numel() > 25
    assert torch.equal(drawn, windows(tokens, 7, 50, order="random", seed=1))
    assert not torch.equal(drawn, windows(tokens, 7, 50, order="random", seed=2))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_windows_reach_both_ends():
    starts = windows(torch.arange(6), 4, 200, order="random")[:, 0]
    assert starts.min() == 0 and starts.max() == 2


def test_too_short_a_text_is_refused_with_the_numbers():
    message = (
        r"windows=3 of data\.calibration\.length=4 tokens need 12 tokens, the text has only 11"
    )
    with pytest.raises(DataError, match=message):
        windows(torch.arange(11), 4, 3)
    for order in ("first", "random"):
        with pytest.raises(DataError, match=r"eval\.length=12"):
            windows(torch.arange(11), 12, None, order=order, field="eval")


@pytest.mark.parametrize(
    "setting", [{"length": 0}, {"length": "8"}, {"count": 0}, {"count": True}, {"order": "last"}]
)
def test_settings_that_make_no_sense_are_refused(setting):
    with pytest.raises(ConfigError, match=r"data\.calibration\."):
        windows(torch.arange(100), **{"length": 8, "count": 2} | setting)


def test_tokenize_whole_text_and_packed_samples(caplog):
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 4
    whole = tokenize(tokenizer, "abc abc")
    assert whole.dtype == torch.int64 and tokenizer.decode(whole) == "abc abc"
    eos = torch.tensor([tokenizer.eos_token_id])
    packed = tokenize(tokenizer, ["abc", " abc", "x"])
    assert torch.equal(
        packed, torch.cat([whole[:3], eos, whole[3:], eos, tokenize(tokenizer, "x")])
    )
    assert "longer than" not in caplog.text
