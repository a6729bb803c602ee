"""Hub repositories, and local folders in the same layout.

Only safetensors are read, for unpickling runs code. A gated model is opened by HF_TOKEN in the
environment, which the hub's own client reads; it is neither kept nor shown here.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config.checks import boolean, one_of
from harness.config.errors import ConfigError, DataError, reason
from harness.config.paths import expanded
from harness.libraries import hub
from harness.models.source import BlockStorage, ModelSource
from harness.models.weights import INDEX, PROCESSORS, SINGLE, Weights, shard_names, weights_of
from harness.structure.facts import config_of, facts_of

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class Hub(ModelSource):
    """A hub repository or a local folder: config.json, tokenizer files, *.safetensors.

    A repository that is already in the local cache is used from there, without asking the hub.
    trust_remote_code: let it run its own Python. weights: memory, or disk = each block is read when
    it is used and dropped again.
    """

    path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    weights: str = "memory"

    def __post_init__(self):
        super().__post_init__()
        self.name = self.name or Path(self.path or "hf").name
        boolean("model.trust_remote_code", self.trust_remote_code)
        one_of("model.weights", self.weights, ("memory", "disk"))

    def check(self) -> None:
        if self._folder is None:
            with self._explained():
                cached = self._cached()
            if not cached:
                self._check_hub()
                return
        elif self._config and not any(self._folder.glob("*.safetensors*")):
            raise self._no_safetensors([file.name for file in self._folder.iterdir()])
        # both are needed later; what is wrong with them is refused now
        _ = self._weights
        _ = self._tokenizer

    def facts(self) -> dict:
        return facts_of(self._config, f"model.path={self.path}")

    @property
    def warnings(self) -> list[str]:
        return list(self._weights.warnings)

    def load(self, device: str | torch.device = "cpu"):
        import torch

        from harness.models.offload import skeleton
        from harness.structure.composite import model_class

        weights = self._weights
        name = weights.dtype if self.dtype == "auto" else self.dtype
        dtype = getattr(torch, name)
        if self.weights == "disk":
            with self._explained():
                model = skeleton(self._config, weights, dtype, device)
            return self.ready(model), self._tokenizer
        with self._explained():
            model = model_class(self._config).from_pretrained(
                dtype=dtype, use_safetensors=True, **self._origin()
            )
        return self.ready(model, device), self._tokenizer

    def offloaded(self, model, scratch: Path) -> BlockStorage | None:
        from harness.models.adapter import Adapter
        from harness.models.offload import Files, OffloadedBlocks

        if self.weights == "memory":
            return None
        adapter = Adapter(model)
        return OffloadedBlocks(
            adapter.blocks,
            adapter.structure.blocks,
            Files(self._weights, model),
            scratch,
            adapter.device,
        )

    def origin(self) -> Weights:
        return self._weights

    @cached_property
    def _config(self):
        """transformers' config."""
        from huggingface_hub import hf_hub_download

        with self._explained():
            if self._folder is not None:
                return config_of(self._folder)
            offline = self._cached()
            path = hf_hub_download(
                self._address, "config.json", revision=self.revision, local_files_only=offline
            )
            return config_of(Path(path).parent, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _weights(self) -> Weights:
        """What the files give the model; of a repository, they are fetched."""
        with self._explained():
            return weights_of(self._files(), self._config)

    @cached_property
    def _tokenizer(self):
        from transformers import AutoTokenizer

        with self._explained("needs a tokenizer beside its weights, which"):
            tokenizer = AutoTokenizer.from_pretrained(**self._origin())
        # where there are no files, transformers makes a tokenizer of nothing
        if not tokenizer("text")["input_ids"]:
            raise DataError(
                f"model.path={self.path} needs a tokenizer beside its weights; save it there with "
                "save_pretrained"
            )
        return tokenizer

    def _files(self) -> Path:
        """The folder with the weight files."""
        from huggingface_hub import snapshot_download

        if self._folder is not None:
            return self._folder
        folder = snapshot_download(
            self._address,
            revision=self.revision,
            allow_patterns=["model*.safetensors", INDEX, PROCESSORS],
            local_files_only=self._cached(),
        )
        return Path(folder)

    def fingerprint(self) -> str:
        if self._folder is None:
            return f"{self.path}@{self.revision or 'main'}"
        digest = hashlib.sha256()
        for file in sorted(self._folder.iterdir()):
            if file.name == "config.json":
                digest.update(file.read_bytes())
            elif file.is_file() and file.suffix != ".md":
                # of gigabytes of weights, size and time stand for the content
                stat = file.stat()
                digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        return f"{self._folder.resolve().name}:{digest.hexdigest()[:16]}"

    @property
    def _address(self) -> str:
        """`path`, which has no default that would do."""
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError("model=hf needs model.path: a hub id (owner/name) or a local folder")
        return self.path

    @property
    def _folder(self) -> Path | None:
        folder = expanded(self._address)
        return folder if folder.is_dir() else None

    def _origin(self) -> dict:
        return {
            "pretrained_model_name_or_path": str(self._folder or self.path),
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": self._folder is not None or self._cached(),
        }

    def _cached(self) -> bool:
        """Whether the hub client's cache holds the config and every weight file."""
        from huggingface_hub import try_to_load_from_cache

        def local(file: str) -> str | None:
            path = try_to_load_from_cache(self._address, file, revision=self.revision)
            # neither None nor the mark of a file that the repository is known to lack
            return path if isinstance(path, str) else None

        shards = [SINGLE]
        if not local(SINGLE):
            index = local(INDEX)
            if index:
                shards = shard_names(Path(index))
        return all(local(file) for file in ("config.json", *shards))

    def _check_hub(self) -> None:
        from huggingface_hub import HfApi

        with self._explained():
            info = HfApi().model_info(self._address, revision=self.revision, timeout=hub.TIMEOUT)
            if info.gated:
                HfApi().auth_check(self._address)
        files = [sibling.rfilename for sibling in info.siblings or []]
        if not any(file.endswith(".safetensors") for file in files):
            raise self._no_safetensors(files)

    def _no_safetensors(self, files: list[str]) -> DataError:
        pickles = [file for file in files if Path(file).suffix in (".bin", ".pt", ".pth", ".ckpt")]
        instead = "no weights"
        if pickles:
            instead = f"only {pickles[0]}, and pickled weights are not opened"
        return DataError(
            f"model.path={self.path}: no *.safetensors but {instead}; save it again with "
            "save_pretrained"
        )

    @contextmanager
    def _explained(self, needs: str = ""):
        """Turn what the hub's client and transformers raise into one sentence with a way out.

        needs: what was asked for.
        """
        try:
            yield
        except ConfigError:
            raise
        except DataError as error:  # of a file, which is one of this folder
            field = f"model.path={self.path}"
            if not str(error).startswith(field):
                error = DataError(f"{field}: {error}")
            raise error from None
        except Exception as error:  # of the client and of transformers, whichever it is
            problem = hub.refusal(error, f"model.revision={self.revision}")
            if problem is None and self._folder is not None:
                problem = f"{needs} cannot be read: {reason(error)}".strip()
            elif problem is None:
                problem = (
                    f"is no folder here, and cannot reach the hub for it ({reason(error)}); "
                    "give a local folder: model=hf model.path=DIR"
                )
            raise DataError(f"model.path={self.path} {problem}") from error
