"""save_pretrained and push_to_hub of a loaded checkpoint: the layout that it was loaded from.

Weights as they compute do not tell their codes and scales, so these are copied and not made
again, once the model is found to be what they decode to. transformers' own two methods know of no
file but weights and configs; the model gets these in their place, its class keeps its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from harness.checkpoints.folder import digests
from harness.checkpoints.native_files import DIGESTS
from harness.checkpoints.native_tensors import changed
from harness.config.errors import DataError
from harness.store import write_json
from harness.structure.facts import read_object


def keep(model: PreTrainedModel, folder: str | Path) -> None:
    """Have a model that was loaded from a folder saved as that folder is."""
    saved = Saved(model, Path(folder).expanduser())
    model.__dict__ |= {"save_pretrained": saved.save_pretrained, "push_to_hub": saved.push_to_hub}


class Saved:
    """A loaded model, and the folder that it came from."""

    def __init__(self, model: PreTrainedModel, folder: Path):
        self.model = model
        self.folder = folder

    @torch.no_grad()
    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options,
    ) -> None:
        """Write weights, formats, online matrices, tokenizer and card as they were, and how the
        model generates by now.

        options: those of transformers, of which a copy needs none. Raises DataError where the model
        is not that of its files any more.
        """
        if not is_main_process:
            return
        name = changed(self.model, self.folder)
        if name is not None:
            raise DataError(
                f"{name} is not what {self.folder} holds any more, and its codes are not known; "
                "quantize the changed model by a run with export=harness."
            )
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for file in [*read_object(self.folder / DIGESTS), "README.md"]:
            there = (self.folder / file).is_file()  # a card may have been taken away
            if there and (self.folder / file).resolve() != (target / file).resolve():
                shutil.copyfile(self.folder / file, target / file)
        if self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(target)
        write_json(target / DIGESTS, digests(target))
        if push_to_hub:
            upload(target, repo_id or target.name, options.get("token"), options.get("private"))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        **commit,
    ) -> str:
        """Upload what save_pretrained writes, the card included; returns the address.

        commit: commit_message, commit_description, revision, create_pr, as transformers has them.
        """
        commit = {key: x for key, x in commit.items() if key not in ("tags", "max_shard_size")}
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(Path(folder), repo_id, token, private, **commit)


def upload(
    folder: Path,
    repository: str,
    token: str | bool | None = None,
    private: bool | None = None,
    **commit,
) -> str:
    """Upload all files of a folder to a repository of the hub, made if there is none; returns the
    address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repository, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=name, folder_path=folder, **commit))
