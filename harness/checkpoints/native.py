"""The project's own checkpoint: a folder that loads as the very model that was evaluated.

native_writer.py writes it, native_tensors.py finds its tensors by the names of parameters.

    model*.safetensors      {module}.codes, .scale, .zero, .global_scale of every quantized weight;
                            every other parameter and buffer as it is; {block}.{site}.global_scale
                            of activations with a calibrated scale, {attention}.key_scale
                            and .value_scale of keys and values; what stands beside the text
                            decoder (towers that see or hear) as in the files it came from, by the
                            names and in the dtype that it has there
    placement.safetensors   the matrices that stay online, all placements in order
    harness.json            version, dtype, and the format of every weight, of every activation, and
                            of the KV cache
    digests.json            {file: sha256} of everything else
    config.json, generation_config.json, tokenizer and processor files: as transformers has them

Nothing in it is code and nothing is unpickled. A file that is not as it was written is refused
before it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from harness.checkpoints.native_files import DIGESTS, PLACEMENT, RECORD, recorded, unguard
from harness.checkpoints.native_tensors import Tensors, stored
from harness.checkpoints.packed_linear import PackedLinear
from harness.checkpoints.record import Record
from harness.codecs.packing import unpack
from harness.codecs.placement import HEAD_SITE, Placement
from harness.config.errors import DataError
from harness.config.paths import expanded
from harness.formats import KVCache, QTensor
from harness.libraries.conversion import Conversion
from harness.libraries.transformers import empty_plain_cache
from harness.models.adapter import Adapter
from harness.models.attention import cache, named
from harness.models.merge import attach_online, swap, swap_head
from harness.models.offload import assign
from harness.models.quant_linear import QuantLinear, SiteInput
from harness.models.weights import weight_files
from harness.structure.composite import model_class
from harness.structure.facts import config_of, read_object
from harness.structure.structure import Structure


@torch.no_grad()
def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = False,
):
    """(model, tokenizer) of a checkpoint, as evaluated.

    With quantized weights, online matrices, activation and KV quantizers.

    dtype: None = as it was quantized in, where the logits are those of the evaluated model in every
    bit. packed: linears keep their codes, and are dequantized when they are used. Raises DataError,
    naming the file, where one is not as it was written.
    """
    from transformers import AutoTokenizer, GenerationConfig

    folder = expanded(path)
    record = verified(folder)
    config = config_of(folder)
    unguard(config)
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=dtype or record.dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    revive(model, folder, record, torch.device(device), dtype, packed)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def revive(
    model,
    folder: Path,
    record: Record,
    device: torch.device,
    dtype: torch.dtype | None,
    packed: bool = False,
) -> None:
    """Make a model of the folder's config the one that was evaluated, whatever weights it has.

    dtype, packed: as `load` has them.
    """
    model.generation_config.use_cache = True  # a run that read its blocks from disk had none
    adapter = Adapter(model)
    placements = _placements(folder)
    swap(adapter)
    quantized = {*record.activations, *record.weights}
    encoded = any(placement.encoder(None, HEAD_SITE) for placement in placements)
    if encoded or quantized & {HEAD_SITE, adapter.structure.head}:
        swap_head(adapter)
    with ExitStack() as stack:
        tensors = Tensors(folder, stack, device)
        towers = _fill_towers(model, adapter.structure, tensors)
        _fill(model, record, tensors, dtype, packed, towers)
        for name, site in sites(adapter):
            site.format = record.activations.get(name)
            site.global_scale = tensors.find(f"{name}.global_scale")
        if record.kv is not None:
            _fill_cache(adapter, record.kv, tensors)
    model.tie_weights()  # where its config says so
    for placement in placements:
        attach_online(adapter, placement)
    if record.kv is not None or any(placement.query_key for placement in placements):
        adapter.backbone.register_forward_pre_hook(_QuantizedCache(adapter), with_kwargs=True)


def verified(folder: Path) -> Record:
    """What harness.json says, once every file but the text for people is found to be as it was
    written. Raises DataError.
    """
    recorded(folder)
    listed = read_object(folder / DIGESTS)
    for name, digest in listed.items():
        if Path(name).name != name or not isinstance(digest, str):
            raise DataError(
                f"{folder / DIGESTS}: {name}: needs the hash of a file of this folder; export it "
                "again."
            )
    # a card may be edited: nothing is loaded from it
    digests = {name: digest for name, digest in listed.items() if not name.endswith(".md")}
    needed = {"config.json", RECORD, PLACEMENT}
    for name in (*digests, *needed):
        if not (folder / name).is_file():
            raise DataError(f"{folder} lacks {name}; copy the checkpoint again.")
    for name, digest in digests.items():
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise DataError(
                    f"{folder / name} is damaged or changed: its hash is not that in {DIGESTS}; "
                    "copy it again."
                )
    needed |= {file.name for file in weight_files(folder)}
    unlisted = sorted(needed - set(digests))
    if unlisted:
        raise DataError(
            f"{folder / DIGESTS} says nothing of {', '.join(unlisted)}; export it again."
        )
    return Record.read(folder)


def sites(adapter: Adapter) -> Iterator[tuple[str, SiteInput]]:
    """(absolute name, what is read there) of every site of a swapped model: model.layers.0.attn_in,
    .., head_in.
    """
    for index, block in enumerate(adapter.blocks):
        for site in adapter.sites(index):
            yield adapter.name(index, site.name), block.get_submodule(site.linears[0]).site
    if isinstance(adapter.head, QuantLinear):
        yield HEAD_SITE, adapter.head.site


def _placements(folder: Path) -> list[Placement]:
    with safe_open(folder / PLACEMENT, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        try:
            specs = json.loads((file.metadata() or {})["placements"])
        except (ValueError, KeyError):
            specs = None
    if not isinstance(specs, list):
        raise DataError(f"{folder / PLACEMENT} says nothing of its placements; export it again.")
    return [unpack(spec, tensors) for spec in specs]


def _fill_towers(model, structure: Structure, tensors: Tensors) -> set[str]:
    """Give what stands beside the text decoder its tensors; returns the parameters they became."""
    conversion = Conversion(model)
    empty = {name: each for name, each in model.state_dict().items() if structure.beside(name)}
    taken = [name for name in tensors.files if conversion.parameters(name)[0] in empty]
    filled = conversion.converted({name: tensors.take(name) for name in taken})
    for name, tensor in filled.items():
        assign(model, name, tensor.to(empty[name].dtype))
    return set(filled)


def _fill_cache(adapter: Adapter, kv: KVCache, tensors: Tensors) -> None:
    """Have keys and values quantized, on scales that stand in the files where they are static."""
    for name, heads in named(adapter).items():
        heads.format = kv
        if kv.needs_static:
            heads.scales = {part: tensors.take(f"{name}.{part}_scale") for part in ("key", "value")}


def _fill(
    model: nn.Module,
    record: Record,
    tensors: Tensors,
    dtype: torch.dtype | None,
    packed: bool,
    filled: Container[str],
) -> None:
    """Give a swapped model its tensors, but for those that are filled.

    dtype: of parameters, weights and biases, None as they are.
    """
    buffers = dict(model.named_buffers())
    for name, empty in (dict(model.named_parameters()) | buffers).items():
        if name in filled:
            continue
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        tensor = stored(name, empty.shape, record, tensors)
        if isinstance(tensor, QTensor):
            if packed and isinstance(module, QuantLinear):
                packed_linear = PackedLinear(module, tensor, dtype or record.dtype)
                model.set_submodule(owner, packed_linear)
                continue
            tensor = tensor.dequantize()
        # the rotary table, which has a dtype of its own
        computed = name in buffers and not isinstance(module, QuantLinear)
        assign(model, name, tensor if dtype is None or computed else tensor.to(dtype))


class _QuantizedCache:
    """Has the plain cache with which a generation begins store keys rotated and quantized: each
    token once, not at every step. Any other cache is right too, but its keys and values are
    quantized again whenever they are read.
    """

    def __init__(self, adapter: Adapter):
        self.adapter = adapter

    def __call__(self, backbone: nn.Module, args: tuple, kwargs: dict) -> None:
        past = empty_plain_cache(kwargs)
        if past is not None:
            past.layers = cache(self.adapter).layers
