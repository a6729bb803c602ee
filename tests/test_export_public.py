"""Commands as the public may read them: without the folders of whoever ran them."""

import shlex

import pytest

from harness.checkpoints.public import public


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("eval.perplexity.corpora=[data,/home/me/secret]", "eval.perplexity.corpora=[data,secret]"),
        ("data.path=../me/x", "data.path=x"),
        ("data.path=me/texts/x", "data.path=x"),
        ("data.path=/home/me/my texts/", "data.path=my texts"),
        ("data.path=/home/me/a\\,b/c", "data.path=c"),
        ("data.path=my texts/../a b/c", "data.path=c"),
        ("export.path=~/out", "export.path=out"),
        ("data.calibration={path: /home/me/y}", "data.calibration={path: y}"),
        (
            "data.calibration={path:'~me/a, b/y',windows: 3}",
            "data.calibration={path:'y',windows: 3}",
        ),
        ("model.path=owner/name", "model.path=owner/name"),
        ("hydra/launcher=slurm", "hydra/launcher=slurm"),
        (
            "eval.generate.prompts=['Half of 3/4 and/or (see ../me/x) http://a/b']",
            "eval.generate.prompts=['Half of 3/4 and/or (see x) http://a/b']",
        ),
    ],
    ids=str,
)
def test_no_folder_of_whoever_ran_it_is_public(word, told):
    assert public(shlex.join(["python", "run.py", word])) == shlex.join(["python", "run.py", told])


def test_what_is_a_folder_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert public("harness model.path=me/model") == "harness model.path=model"
