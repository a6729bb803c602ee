"""What a model consists of and what may be done to it, from its config alone.

    python -m harness.structure MODEL

MODEL is a hub id or a folder with a config.json. No weights are read, and no code of a model's own
is run. Exit status: 0 done, 2 the arguments are wrong or MODEL has no structure that can be told.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config.errors import DataError
from harness.config.paths import expanded

# torch and transformers take seconds to import: what needs neither is refused before
if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from harness.structure.structure import Structure

CONFIG = "config.json"
HUB_TIMEOUT = 2.0  # seconds that a hub which does not answer is waited for


def main(argv: list[str] | None = None) -> int:
    """The exit status of a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.structure",
        description="What a model consists of and what may be done to it; needs no weights.",
    )
    parser.add_argument("model", metavar="MODEL", help="a hub id or a folder with a config.json")
    model = parser.parse_args(argv).model
    try:
        structure = structure_of(folder_of(model))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from harness.structure.table import print_structure

    print_structure(structure)
    return 0


def folder_of(model: str) -> Path:
    """The folder with a model's config; from the hub where it is none here and in no cache."""
    folder = expanded(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub import errors as hub

    try:
        path = try_to_load_from_cache(model, CONFIG)
        if not isinstance(path, str):
            # a hub that is out of reach says so here at once, where a download would try on
            info = HfApi().model_info(model, timeout=HUB_TIMEOUT)
            if CONFIG not in [file.rfilename for file in info.siblings or []]:
                raise DataError(f"{model} lacks {CONFIG} on the hub; give another model.")
            path = hf_hub_download(model, CONFIG)
        return Path(path).parent
    except DataError:
        raise
    except hub.HFValidationError:
        problem = "is neither a folder here nor a hub id (owner/name)"
    except hub.GatedRepoError:  # one of the next kind, so it is asked for first
        problem = "is gated: accept its licence on its hub page and set HF_TOKEN"
    except hub.RepositoryNotFoundError:
        problem = "is not on the hub, or is private: check the name, or set HF_TOKEN"
    except Exception:  # what a connection raises has changed over the client's releases
        problem = f"is no folder here, and the hub cannot be reached; give a folder with a {CONFIG}"
    raise DataError(f"{model} {problem}.")


def structure_of(folder: Path) -> Structure:
    """The structure of the model whose config a folder holds."""
    kind = model_type(folder)
    with quiet():
        from harness.structure.derive import derive
        from harness.structure.skeleton import skeleton

        config = config_of(folder, kind)
        try:
            model = skeleton(config)
        except Exception as error:  # each architecture checks its sizes in its own way
            raise DataError(
                f"{folder}: transformers makes no causal language model of this {kind}: "
                f"{reason(error)}."
            ) from None
        try:
            return derive(model)
        except Exception as error:  # of a forward that nobody here has seen
            raise DataError(
                f"{folder}: the forward of this {kind} cannot be looked through without weights: "
                f"{reason(error)}."
            ) from None


def config_of(folder: Path, kind: str) -> PreTrainedConfig:
    """transformers' config of a folder, of that model_type."""
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    if kind not in CONFIG_MAPPING:
        raise DataError(
            f"{folder / CONFIG}: model_type={kind} is unknown to transformers {__version__}, and "
            "code of a model's own is not run; upgrade transformers."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each release validates by other classes
        raise DataError(
            f"{folder / CONFIG} cannot be read as the config of a {kind}: {reason(error)}."
        ) from None
    # it names files of code, which the class of a model would ask about at the terminal
    vars(config).pop("auto_map", None)
    return config


def model_type(folder: Path) -> str:
    """The name of the architecture in a folder's config."""
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder} lacks {CONFIG}; give a folder saved by save_pretrained."
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path} is damaged, not JSON ({reason(error)}); copy it again.") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str):
        raise DataError(
            f"{path}: model_type={kind} names no architecture; give a folder saved by "
            "save_pretrained."
        )
    return kind


def reason(error: Exception) -> str:
    """The first sentence of what another library's error says, or its name."""
    first = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    # the text of a missing key is the key alone
    named = not first or isinstance(error, LookupError)
    return f"{type(error).__name__} {first}".strip() if named else first


@contextmanager
def quiet() -> Iterator[None]:
    """Within it transformers says nothing of kernels and defaults, which change no structure."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


if __name__ == "__main__":
    sys.exit(main())
