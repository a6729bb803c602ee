"""What the files of a folder give a model: tensors, their dtype and shape, tied or not.

Asked once, for models in memory and models on disk. The rules are transformers' own (tests hold
them to `from_pretrained`):

    files   `model.safetensors` alone where it is there, else every shard that
            `model.safetensors.index.json` names
    dtype   the config's, else that of the first floating tensor
    head    one matrix with the embedding where the config says so, unless the files hold
            another one

What transformers would do without a word is refused: codes read as weights, tensors that no
parameter takes, two files that hold one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.config.errors import DataError
from harness.structure.facts import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROCESSORS = "*processor_config.json"  # how a model is shown images and sounds
# {safetensors' name: torch's name} of the dtypes that a weight may have
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: where it is, its dtype in safetensors' words, its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, sorted.

    Raises DataError where one is missing or named outside of the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    names = shard_names(folder / INDEX)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder} lacks {_some(missing)} of its {len(names)} weight files; copy it again."
        )
    return [folder / name for name in names]


def shard_names(index: Path) -> list[str]:
    """The files that an index names, sorted.

    Raises DataError where it is no index, or names a file in another folder.
    """
    if not index.exists():
        raise DataError(
            f"{index.parent} holds neither {SINGLE} nor {INDEX}; give a folder saved by "
            "save_pretrained."
        )
    names = read_object(index).get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(name, str) for name in names.values())
    ):
        raise DataError(
            f"{index}: weight_map is to say which file holds which tensor; copy it again."
        )
    for name in sorted(set(names.values())):
        # an index comes with the download: no path of its may lead out of the folder
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise DataError(
                f"{index}: weight_map names {name}, which is no safetensors file of this folder; a "
                "checkpoint keeps its weights beside its config.json."
            )
    return sorted(set(names.values()))


def stored(files: Iterable[Path]) -> dict[str, Stored]:
    """{tensor: where and how it is stored}, in the order of the files.

    Reads no tensor. Raises DataError for a damaged file, and for a tensor that two files hold.
    """
    from safetensors import SafetensorError, safe_open

    entries: dict[str, Stored] = {}
    for path in files:
        try:
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in entries:
                        raise DataError(
                            f"{path} and {entries[name].file.name} both hold {name}; keep one of "
                            "them."
                        )
                    part = file.get_slice(name)
                    entries[name] = Stored(path, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is damaged ({error}); copy it again.") from None
    return entries


def tensor_files(folder: Path) -> dict[str, Path]:
    """{tensor: file} of a folder of safetensors.

    Raises DataError as `weight_files` and `stored` do.
    """
    return {name: each.file for name, each in stored(weight_files(folder)).items()}


@dataclass(frozen=True)
class Weights:
    """A folder's weights, found to fit a model.

    stored: {name in the files: where it is} of what the model takes; parameters: {name in the
    files: the parameters it is, or is a part of}; dtype: torch's name of the model's dtype;
    folder: where the files lie; warnings: what is in them and not in the model.
    """

    stored: Mapping[str, Stored]
    parameters: Mapping[str, tuple[str, ...]]
    dtype: str
    folder: Path
    warnings: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, Path]:
        """{name in the files: file}."""
        return {name: each.file for name, each in self.stored.items()}


def weights_of(folder: Path, config) -> Weights:
    """The weights of a folder for a model of this config (transformers').

    They are compared by name, dtype and shape; no tensor is read. Raises DataError where they are
    not those of an unquantized model of that config.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise DataError(
            f"{folder / 'config.json'}: quantization_config says that the weights are quantized; "
            "measure it with model=checkpoint, or give the unquantized model."
        )
    from harness.libraries.conversion import Conversion
    from harness.libraries.transformers import tied_names

    entries = stored(weight_files(folder))
    model = _without_storage(config)
    expected = model.state_dict()
    optional = tied_names(model)
    conversion = Conversion(model)
    parameters = {name: conversion.parameters(name) for name in entries}
    # a model may have tables of whole numbers, which are no codes
    whole = {name for name, each in expected.items() if not each.is_floating_point()}
    floats = {name: each for name, each in entries.items() if parameters[name][0] not in whole}
    _refuse_codes(folder, floats)
    given = {target for targets in parameters.values() for target in targets}
    missing = [name for name in expected if name not in given and name not in optional]
    if missing:
        raise DataError(
            f"{folder} lacks the weights {_some(missing)}, which its config.json asks for."
        )
    for name, entry in entries.items():
        parameter = expected.get(parameters[name][0])
        # what is made of several tensors has its own shape, which conversion checks
        if parameter is None or conversion.converts(name):
            continue
        if entry.shape != tuple(parameter.shape):
            raise DataError(
                f"{entry.file}: {name} has shape {list(entry.shape)}, and config.json asks for "
                f"{list(parameter.shape)}; one of them is of another model."
            )
    taken = {name for name, targets in parameters.items() if targets[0] in expected}
    warnings = _left_over(folder, model, [name for name in entries if name not in taken])
    if config.dtype is not None:
        dtype = str(config.dtype).removeprefix("torch.")
    else:
        dtype = next((FLOATS[each.dtype] for each in floats.values()), "float32")
    return Weights(
        {name: entries[name] for name in entries if name in taken},
        {name: parameters[name] for name in entries if name in taken},
        dtype,
        folder,
        warnings,
    )


def _refuse_codes(folder: Path, entries: Mapping[str, Stored]) -> None:
    codes = [name for name, each in entries.items() if each.dtype not in FLOATS]
    if codes:
        kinds = ", ".join(sorted({entries[name].dtype for name in codes}))
        raise DataError(
            f"{folder}: {_some(codes)} are stored as {kinds}: codes of a quantized model, which "
            "are no weights; give the unquantized model, or one that it was dequantized to."
        )


def _left_over(folder: Path, model, names: list[str]) -> tuple[str, ...]:
    """Refuse tensors that belong to the model's modules or to more layers than it has.

    Warn of others that nothing takes.
    """
    from harness.libraries.transformers import unused

    ignored = set(unused(model, names))
    # older files hold the rotary tables, which are computed from the config now
    names = [
        name for name in names if name not in ignored and not name.endswith("rotary_emb.inv_freq")
    ]
    modules = {name for name, _ in model.named_modules() if name}
    layers = {name.rpartition(".")[0] for name in modules if name.rpartition(".")[2].isdigit()}
    inside = [name for name in names if name.rpartition(".")[0] in modules or _owner(name, layers)]
    if inside:
        raise DataError(
            f"{folder}: no parameter of the model takes {_some(inside)}; its config.json says less "
            "than its files hold (num_hidden_layers, or how it is quantized)."
        )
    if not names:
        return ()
    return (f"no parameter of the model takes {_some(names)}",)


def _owner(name: str, layers: set[str]) -> bool:
    """Whether a tensor stands in one of the lists of layers."""
    return any(name.startswith(f"{each}.") for each in layers)


def _without_storage(config):
    import torch

    from harness.structure.composite import model_class

    with torch.device("meta"):
        return model_class(config).from_config(config)


def _some(names: list[str]) -> str:
    text = ", ".join(names[:SHOWN])
    rest = len(names) - SHOWN
    if rest > 0:
        text += f" and {rest} more"
    return text
