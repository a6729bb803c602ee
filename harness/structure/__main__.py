"""What a model consists of and what may be done to it, from its config alone.

    python -m harness.structure MODEL

MODEL is a hub id or a folder with a config.json. No weights are read, and no code of a model's own
is run. Exit status: 0 done, 2 the arguments are wrong or MODEL has no structure that can be told.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config.errors import DataError, reason
from harness.config.paths import expanded
from harness.libraries import hub
from harness.structure import facts
from harness.structure.facts import CONFIG

# torch and transformers take seconds to import: what needs neither is refused before
if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from harness.structure.structure import Structure


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

    try:
        path = try_to_load_from_cache(model, CONFIG)
        if not isinstance(path, str):
            # a hub that is out of reach says so here at once, where a download would try on
            info = HfApi().model_info(model, timeout=hub.TIMEOUT)
            if CONFIG not in [file.rfilename for file in info.siblings or []]:
                raise DataError(f"{model} lacks {CONFIG} on the hub; give another model.")
            path = hf_hub_download(model, CONFIG)
        return Path(path).parent
    except DataError:
        raise
    except Exception as error:  # what a connection raises has changed over the client's releases
        out_of_reach = (
            f"is no folder here, and the hub cannot be reached; give a folder with a {CONFIG}"
        )
        raise DataError(f"{model} {hub.refusal(error) or out_of_reach}.") from None


def structure_of(folder: Path) -> Structure:
    """The structure of the model whose config a folder holds."""
    kind = facts.read_object(folder / CONFIG).get("model_type")
    with quiet():
        from harness.structure.derive import derive
        from harness.structure.skeleton import skeleton

        config = config_of(folder, kind)
        try:
            model = skeleton(config)
        except Exception as error:  # each architecture checks its sizes in its own way
            raise DataError(
                f"{folder}: transformers makes no causal language model of this {kind}: "
                f"{first_sentence(error)}."
            ) from None
        try:
            return derive(model)
        except Exception as error:  # of a forward that nobody here has seen
            raise DataError(
                f"{folder}: the forward of this {kind} cannot be looked through without weights: "
                f"{first_sentence(error)}."
            ) from None


def config_of(folder: Path, kind: object) -> PreTrainedConfig:
    """transformers' config of a folder, which says that it is of that model_type."""
    from transformers import CONFIG_MAPPING, __version__

    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        raise DataError(
            f"{folder / CONFIG}: model_type={kind} is unknown to transformers {__version__}, and "
            "code of a model's own is not run; upgrade transformers."
        )
    config = facts.config_of(folder, trust_remote_code=False)
    # it names files of code, which the class of a model would ask about at the terminal
    vars(config).pop("auto_map", None)
    return config


def first_sentence(error: Exception) -> str:
    """Of what another library says: transformers adds a list of all that it knows."""
    return reason(error).partition(". ")[0]


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
