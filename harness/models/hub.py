"""Hub repositories, and local folders in the same layout.

Only safetensors are read, for unpickling runs code. A gated model is opened by HF_TOKEN in the environment, which the hub's own
client reads; it is neither kept nor shown here.
"""

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ConfigError, DataError
from harness.models.load import ModelSource

HUB_TIMEOUT = 2.0  # seconds `check` waits for a hub that does not answer


@dataclass(kw_only=True)
class Hub(ModelSource):
    """A hub repository or a local folder in the same layout (config.json, tokenizer files, *.safetensors).

    A repository that is already in the local cache is used from there, without asking the hub. weights: memory, or disk = each
    block is read when it is used and dropped again.
    """

    path: str | None = None
    revision: str | None = None
    weights: str = "memory"

    def __post_init__(self):
        super().__post_init__()
        self.name = self.name or Path(self.path or "hf").name
        if self.weights not in ("memory", "disk"):
            raise ConfigError(f"model.weights={self.weights}: choose memory or disk")

    def check(self) -> None:
        if self._folder is not None:
            self._check_folder(self._folder)
            return
        with self._explained():
            cached = self._cached()
        if not cached:
            self._check_hub()

    def facts(self) -> dict:
        from huggingface_hub import hf_hub_download

        with self._explained():
            path = self._folder and self._folder / "config.json"
            path = path or hf_hub_download(self.path, "config.json", revision=self.revision, local_files_only=self._cached())
            return json.loads(Path(path).read_text(encoding="utf-8"))

    def load(self, device="cpu"):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dtype = "auto" if self.dtype == "auto" else getattr(torch, self.dtype)
        with self._explained():
            tokenizer = AutoTokenizer.from_pretrained(**self._origin())
            if self.weights == "disk":
                return self._skeleton(device), tokenizer
            model, report = AutoModelForCausalLM.from_pretrained(
                dtype=dtype, use_safetensors=True, output_loading_info=True, **self._origin()
            )
        if report["missing_keys"]:  # transformers would go on with random numbers in their place
            raise DataError(f"model.path={self.path} lacks the weights {', '.join(sorted(report['missing_keys'])[:4])}")
        return self.ready(model, device), tokenizer

    def _skeleton(self, device):
        import torch
        from transformers import AutoConfig

        from harness.models.shelf import shards, skeleton

        config = AutoConfig.from_pretrained(**self._origin())
        dtype = (config.dtype or torch.float32) if self.dtype == "auto" else getattr(torch, self.dtype)
        config.use_cache = False
        return skeleton(config, shards(self._files()), dtype, device).eval()

    def shelf(self, model, scratch: Path):
        from harness.models.families import Adapter
        from harness.models.shelf import Shelf, shards

        if self.weights == "memory":
            return None
        adapter = Adapter(model)
        return Shelf(adapter.blocks, adapter.family.blocks, shards(self._files()), scratch, model.dtype, adapter.device)

    def _files(self) -> Path:
        """The folder with the weight files."""
        from huggingface_hub import snapshot_download

        if self._folder is not None:
            return self._folder
        wanted = ["model*.safetensors", "model.safetensors.index.json"]
        here = self._cached()
        with self._explained():
            return Path(snapshot_download(self.path, revision=self.revision, allow_patterns=wanted, local_files_only=here))

    def fingerprint(self) -> str:
        if self._folder is None:
            return f"{self.path}@{self.revision or 'main'}"
        digest = hashlib.sha256()
        for file in sorted(self._folder.iterdir()):
            if file.name == "config.json":
                digest.update(file.read_bytes())
            elif file.is_file() and file.suffix != ".md":
                digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
        return f"{self._folder.resolve().name}:{digest.hexdigest()[:16]}"

    @property
    def _folder(self) -> Path | None:
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError("model=hf needs model.path: a hub id (owner/name) or a local folder")
        folder = Path(self.path).expanduser()
        return folder if folder.is_dir() else None

    def _origin(self) -> dict:
        return {
            "pretrained_model_name_or_path": str(self._folder or self.path),
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": self._folder is not None or self._cached(),
        }

    def _check_folder(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise DataError(f"model.path={self.path} has no config.json; give a folder saved by save_pretrained")
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            wanted = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [shard for shard in wanted if not (folder / shard).is_file()]
            if missing:
                raise DataError(f"model.path={self.path} lacks {', '.join(missing[:4])} of its {len(wanted)} weight files")
        elif not any(folder.glob("*.safetensors")):
            raise self._no_safetensors([file.name for file in folder.iterdir()])

    def _cached(self) -> bool:
        """Whether the hub client's cache holds the config and every weight file."""
        from huggingface_hub import try_to_load_from_cache

        def local(file: str) -> str | None:
            found = try_to_load_from_cache(self.path, file, revision=self.revision)
            return found if isinstance(found, str) else None

        index = local("model.safetensors.index.json")
        shards = set(json.loads(Path(index).read_text())["weight_map"].values()) if index else {"model.safetensors"}
        return all(local(file) for file in {"config.json", *shards})

    def _check_hub(self) -> None:
        from huggingface_hub import HfApi

        with self._explained():
            info = HfApi().model_info(self.path, revision=self.revision, timeout=HUB_TIMEOUT)
            if info.gated:
                HfApi().auth_check(self.path)
        files = [sibling.rfilename for sibling in info.siblings or []]
        if not any(file.endswith(".safetensors") for file in files):
            raise self._no_safetensors(files)

    def _no_safetensors(self, files: list[str]) -> DataError:
        pickles = [file for file in files if Path(file).suffix in (".bin", ".pt", ".pth", ".ckpt")]
        found = f"only {pickles[0]}, and pickled weights are not opened" if pickles else "no weights"
        return DataError(f"model.path={self.path}: no *.safetensors but {found}; save it again with save_pretrained")

    @contextmanager
    def _explained(self):
        """Turn what the hub's client and transformers raise into one sentence with a way out."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # the client's HTTP library, and with it its error classes, has changed over time
            causes = [error, error.__cause__, error.__context__]
            if any(isinstance(cause, GatedRepoError) for cause in causes):
                problem = "is gated: accept its licence on its hub page and set HF_TOKEN"
            elif any(isinstance(cause, RevisionNotFoundError) for cause in causes):
                problem = f"has no model.revision={self.revision}"
            elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
                problem = "is not on the hub, or is private: check the name, or set HF_TOKEN"
            elif isinstance(error, HFValidationError):
                problem = "is neither a folder here nor a hub id (owner/name)"
            elif self._folder is not None:
                problem = f"cannot be read ({_first_line(error)})"
            else:
                problem = (
                    f"is no folder here, and cannot reach the hub for it ({_first_line(error)}); "
                    "give a local folder: model=hf model.path=DIR"
                )
            raise DataError(f"model.path={self.path} {problem}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
