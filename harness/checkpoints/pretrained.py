"""Checkpoints of this project in transformers: `import harness`, then from_pretrained.

config.json names the quantization method `harness`, which transformers knows by the two classes
below; importing `harness` has this file imported when transformers is. Without them transformers
skips a method that it does not know, and would fill a quantized model with random numbers: so
config.json also names a weight file that cannot be one, by which transformers itself stops, showing
that name (native_files.py).

transformers builds the model and loads what it finds by its own names; then all of it is made as
harness.load makes it, by the same code. It needs nothing of transformers but public hooks:
    register_quantization_config, register_quantizer, HfQuantizer.

This file is imported in the midst of transformers' own import, hence what it leaves for later.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from harness.checkpoints.native_files import METHOD, PLACEMENT, unguard
from harness.config.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


@register_quantization_config(METHOD)
class HarnessConfig(QuantizationConfigMixin):
    """Nothing but the method: what a checkpoint holds stands in its harness.json."""

    def __init__(self, **_):
        self.quant_method = cast(Any, METHOD)  # annotated as one of transformers' own


@register_quantizer(METHOD)
class HarnessQuantizer(HfQuantizer):
    """Has from_pretrained give the model of harness.load, on one device."""

    folder: Path
    dtype: torch.dtype
    undo: Callable[[], None]

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        """Raise DataError for a model that is to be quantized now, or to be spread out."""
        if not self.pre_quantized:
            raise DataError(
                f"quantization_config: {METHOD} names a checkpoint that is quantized already; "
                "quantize a model by `python run.py model=hf model.path=.. export=harness`."
            )
        places = device_map.values() if isinstance(device_map, dict) else ()
        if len(set(places)) > 1 or isinstance(device_map, str) or "disk" in places:
            raise DataError(
                f"device_map={device_map}: a checkpoint of this project is loaded on one device; "
                'give device_map="cuda:0", say, or none.'
            )

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Sees the config before any file is looked for."""
        unguard(config, method=False)
        return config

    # what it is until transformers 5.22, where this one is not asked
    update_tp_plan = update_attn_implementation

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, *, checkpoint_files=None, **kwargs
    ) -> None:
        from harness.libraries.transformers import leave_unfilled

        self.folder = _folder(model, checkpoint_files)
        wanted = model.config.architectures or []
        if type(model).__name__ not in wanted:
            raise DataError(
                f"{self.folder} holds a {', '.join(wanted)}, and {type(model).__name__} was asked "
                "for; load it by that class, or by harness.load."
            )
        self.undo = leave_unfilled(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        from harness.checkpoints.native import revive, verified
        from harness.checkpoints.saved import keep

        self.undo()
        record = verified(self.folder)
        dtype = None if self.dtype == record.dtype else self.dtype
        revive(model, self.folder, record, model.device, dtype)
        keep(model, self.folder)

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _folder(model: PreTrainedModel, files: list[str] | None) -> Path:
    """Where all of the checkpoint lies; what transformers left on the hub is fetched."""
    name = str(model.config.name_or_path)
    if not files:
        raise DataError(f"{name}: has no weights; copy it again.")
    folder = Path(files[0]).parent
    if Path(name).is_dir() or (folder / PLACEMENT).is_file():
        return folder
    from huggingface_hub import snapshot_download

    # the cache of the hub calls a folder by its revision
    return Path(snapshot_download(name, revision=folder.name))
