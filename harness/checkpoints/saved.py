"""save_pretrained and push_to_hub of a loaded checkpoint: the layout that it was loaded from.

Weights as they compute do not tell their codes and scales, so these are copied and not made
again, once the model is found to be what they decode to. transformers' own two methods know of no
file but weights and configs; the model gets these in their place, its class keeps its own.

A folder in use may hold weights by other names, which loaders prefer: those of this layout go, and
whatever else is there stays.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from harness.checkpoints.folder import digest
from harness.checkpoints.native_files import DIGESTS
from harness.checkpoints.native_tensors import changed
from harness.checkpoints.shards import LAYOUT, laid
from harness.config.errors import DataError
from harness.config.paths import expanded
from harness.models.weights import INDEX, SINGLE
from harness.store import replacing, write_json
from harness.structure.facts import read_object

CARD, GENERATION = "README.md", "generation_config.json"  # which may change after a run
COMMIT = ("commit_message", "commit_description", "revision", "create_pr")


def keep(model: PreTrainedModel, folder: str | Path) -> None:
    """Have a model that was loaded from a folder saved as that folder is."""
    saved = Saved(model, expanded(folder))
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

        options: those of transformers, of which a copy needs none, and an upload `token`, `private`
        and COMMIT. Raises DataError where the model is not that of its files any more.
        """
        if not is_main_process:
            return
        name = changed(self.model, self.folder)
        if name is not None:
            raise DataError(
                f"{name} is not what {self.folder} holds any more, and its codes are not known; "
                "quantize the changed model by a run with export=harness."
            )
        target = expanded(save_directory)
        files = self._write(target)
        if push_to_hub:
            commit = {key: options[key] for key in COMMIT if key in options}
            name = repo_id or target.resolve().name
            upload(target, name, options.get("token"), options.get("private"), files, **commit)

    def _write(self, target: Path) -> list[str]:
        """Copy into a folder; returns the names of the files.

        A kill in between leaves a folder that nobody loads: it has no hashes before the end, and
        what tells of weights comes after all else.
        """
        target.mkdir(parents=True, exist_ok=True)
        hashes = {CARD: "", **read_object(self.folder / DIGESTS)}
        if not (self.folder / CARD).is_file():  # it may have been taken away
            del hashes[CARD]
        kept = {(self.folder / file).resolve() for file in hashes}
        if target.resolve() != self.folder.resolve():
            (target / DIGESTS).unlink(missing_ok=True)
        for path in laid(target):
            if path.resolve() not in kept:
                path.unlink()
        for file in sorted(hashes, key=lambda file: file in (SINGLE, INDEX)):
            if (self.folder / file).resolve() != (target / file).resolve():
                with replacing(target / file) as temporary:
                    shutil.copyfile(self.folder / file, temporary)
        if self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(target)
            hashes[GENERATION] = ""
        # Of copies as they were read and verified: what was damaged since is found by them.
        own = {file: digest(target / file) for file in (CARD, GENERATION) if file in hashes}
        write_json(target / DIGESTS, dict(sorted((hashes | own).items())))
        return [*hashes, DIGESTS]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        **commit,
    ) -> str:
        """Upload what save_pretrained writes, the card included; returns the address.

        commit: COMMIT, as transformers has them; a branch that there is not is made.
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
    files: Iterable[str] | None = None,
    **commit,
) -> str:
    """Upload a folder, or these files of it, to a repository of the hub, made if there is none;
    returns the address.

    commit: as in `Saved.push_to_hub`. Weights of another number of files that are there are taken
    away in the same commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repository, private=private, exist_ok=True).repo_id
    branch = commit.get("revision")
    if branch is not None and not branch.startswith("refs/") and not commit.get("create_pr"):
        api.create_branch(name, branch=branch, exist_ok=True)
    patterns = {
        "allow_patterns": None if files is None else list(files),
        "delete_patterns": list(LAYOUT) if laid(folder) else None,
    }
    return str(api.upload_folder(repo_id=name, folder_path=folder, **patterns, **commit))
