"""A second device without one: tensors that say `far` and keep their values on the CPU.

`far` is torch's place for a backend written in Python, so a process that imports this has it until
it ends. Within `Elsewhere()` whatever is made on it or moved to it is a Distant. The CPU computes
its operations, and what a GPU refuses is refused: operands of two devices (a scalar on the CPU may
stand beside others), and its memory read by numpy. So a run shows on any machine where it forgets
to say `device=`.

    python tests/elsewhere.py FOLDER "format=nvfp4 solver=gptq" ..
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from composed import small
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from harness.pipeline import devices, ids
from harness.pipeline.job import execute


class Backend(_DummyBackendModule):
    """What torch.far is."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("far", Backend())
FAR = torch.device("far", 0)
CPU = torch.device("cpu")


class Distant(torch.Tensor):
    """A tensor elsewhere; near: its values."""

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FAR,
        )

    def __init__(self, near):
        self.near = near

    def __repr__(self):
        return f"Distant({self.near})"

    def tolist(self):
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Where `far` can be made from nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def computed(func, args, kwargs):
    """What an operation gives, on the device where it would be."""
    name = func.overloadpacket.__name__
    moves = name in ("_to_copy", "copy_", "_copy_from")
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    distant = any(isinstance(x, Distant) for x in operands)
    if distant and not moves:
        for operand in operands:
            if operand.ndim and not isinstance(operand, Distant) and not name.startswith("index"):
                raise RuntimeError(f"{name}: operands on {FAR} and {CPU}, {operand.shape}")
    far = distant
    if kwargs.get("device") is not None:
        far = torch.device(kwargs["device"]).type == FAR.type
        kwargs = {**kwargs, "device": CPU}
    inner, named = tree_map_only(Distant, lambda x: x.near, (args, kwargs))
    out = func(*inner, **named)
    changed = [
        args[place] if place < len(args) else kwargs[argument.name]
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None
        and argument.alias_info.is_write
        and (place < len(args) or argument.name in kwargs)
    ]
    if changed:  # in place, or into `out`
        return changed[0] if isinstance(out, torch.Tensor) else out
    return tree_map_only(torch.Tensor, Distant, out) if far else out


def made(func):
    """A maker of empty tensors, for torch itself asks the backend for these."""

    def make(*args, **kwargs):
        return Distant(func(*args, **{**kwargs, "device": CPU}))

    return make


def copied(source, target, non_blocking=False):
    near = [x.near if isinstance(x, Distant) else x for x in (source, target)]
    near[1].copy_(near[0])
    return target


backend = torch.library.Library("aten", "IMPL")
backend.impl("empty.memory_format", made(torch.ops.aten.empty.memory_format), "PrivateUse1")
backend.impl("empty_strided", made(torch.ops.aten.empty_strided.default), "PrivateUse1")
backend.impl("_copy_from", copied, "PrivateUse1")


def walk(folder, overrides):
    """A run of the pipeline on that device; its metrics. Raises what went wrong in it."""
    words = overrides.split()
    if any(word.startswith("export=") for word in words):
        words.append(f"export.path={folder / 'export'}")
    cfg, choices = small(folder, *words)
    outcome = execute(cfg, choices)
    assert outcome.status == "done", f"{overrides}: {outcome.error}"
    return outcome.metrics


@contextmanager
def far(name, folder, ranks):
    """In place of devices.device."""
    with Elsewhere():
        yield FAR


def main(folder, runs):
    """Walk the pipeline once for each line of overrides; prints a line of JSON for each."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # new type, new parameters
    devices.device = far
    devices.described = lambda device: {"device": str(device)}
    ids.device_kind = lambda name: FAR.type
    for number, overrides in enumerate(runs):
        metrics = walk(Path(folder) / str(number), overrides)
        print(json.dumps({"overrides": overrides, "ppl": metrics["stages"]["quantized"]["ppl"]}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
