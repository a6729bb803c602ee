"""Names of checkpoints: `{base}-{dataset}_{training}_{peft}_{method}_{tag}`, absent parts left out.

    Qwen3-0.6B-openmath_SFT_LoRa256_QuaRot_w4_g64_a4_kv4_headfp16
    Qwen3-0.6B-QuaRot.GPTQ_wnvfp4_g16_anvfp4_kv16_headfp16

The last hyphen ends the base, for no part behind it has one: a base may hold hyphens, dots and
underscores, a dataset called open-math must be written otherwise. Everything behind is read from
the right: the tag, then the method, then what came before quantization, which is told apart by its
words (TRAININGS, PEFT). So no two models have one name.

The tag is w<weights>_g<group>_a<activations>_kv<cache>_head<output head>, each format as
spelling.py has it; a head that is not quantized is fp16, and auto4.5 is allocated under 4.5 bits a
weight. No g means one scale a channel, as in names written elsewhere, so that one model has one
spelling; gtensor is one scale a tensor, g128x128 one a square.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.checkpoints.spelling import group_of, mixed, spelled, word
from harness.config.build import build
from harness.config.errors import ConfigError
from harness.config.paths import expanded
from harness.models.source import ModelSource

if TYPE_CHECKING:
    from harness.checkpoints.base import Snapshot
    from harness.formats import Scheme

BASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
WORDS = ("dataset", "training", "peft")  # what came before quantization, in order
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9.]*")
TRAININGS = ("SFT", "DPO", "ORPO", "KTO", "PPO", "GRPO", "RLHF", "CPT")
LONGEST = 255 - len("..0123456789.old")  # of a folder's name, with what an export puts around it
PEFT = re.compile(r"(?:Q|rs|Ada)?(?:LoR[aA]|DoR[aA]|lora|dora)\d*|IA3")
FORMAT = re.compile(r"[1-9]\d*|[a-z]{2,}\d[a-z0-9.]*|(?:mixed)?fouroversix")
GROUP = re.compile(r"[1-9]\d*(?:x[1-9]\d*)?|tensor")
LETTERS = {"weight": "w", "group": "g", "act": "a", "kv": "kv", "head": "head"}


@dataclass(frozen=True)
class Name:
    """The parts of a name.

    weight, act, kv, head: bits of an integer format or the word of another; group: elements a
    scale, "128x128", "tensor", or None (channel). Raises ValueError for a part that would be read
    as another.
    """

    base: str
    dataset: str | None = None
    training: str | None = None
    peft: str | None = None
    method: str | None = None
    weight: int | str = 16
    group: int | str | None = None
    act: int | str = 16
    kv: int | str = 16
    head: int | str = "fp16"

    def __post_init__(self):
        if not BASE.fullmatch(self.base):
            raise ValueError(
                f"base={self.base}: needs letters, digits, dots, hyphens and underscores"
            )
        for part in (*WORDS, "method"):
            word = getattr(self, part)
            if word is None:
                continue
            if not WORD.fullmatch(word):
                raise ValueError(
                    f"{part}={word}: needs letters, digits and dots; hyphens and underscores stand "
                    "between parts"
                )
            kind = _kind(word)
            if kind != ("dataset" if part == "method" else part):
                hint = {
                    "training": f"; known: {', '.join(TRAININGS)}",
                    "peft": ", which is one such as LoRa256",
                }.get(part, "")
                raise ValueError(f"{part}={word}: would not be read as the {part}{hint}")
        if self.dataset and not (self.training or self.peft or self.method):
            raise ValueError(
                f"dataset={self.dataset}: alone it would be read as the method; name the training, "
                "too"
            )
        for part in LETTERS:
            value = getattr(self, part)
            if (part, value) == ("group", None):
                continue
            pattern = GROUP if part == "group" else FORMAT
            spelling = str(value)
            if not pattern.fullmatch(spelling) or spelling.isdigit() != isinstance(value, int):
                raise ValueError(f"{part}={value}: is no such part of a name")

    def __str__(self):
        tag = [
            f"{letters}{getattr(self, part)}"
            for part, letters in LETTERS.items()
            if getattr(self, part) is not None
        ]
        parts = filter(None, (self.dataset, self.training, self.peft, self.method))
        return f"{self.base}-{'_'.join([*parts, *tag])}"

    @classmethod
    def of(
        cls, settings: Mapping, choices: Mapping[str, str | None], scheme: Scheme, head: str
    ) -> Name:
        """The name of a run's checkpoint, before or after the run.

        head: the output head's module. The method is transform, solver and tuner, QuaRot.GPTQ, or
        those of them that there are. Raises ConfigError naming the field of `export`.
        """
        section = settings["export"]
        transform = choices["transform"]
        if transform == "identity" and settings["transform"].get("smooth"):
            transform = "smoothquant"
        words = {part: str(section[part]) for part in WORDS if section[part] is not None}
        methods = [
            spelled(option)
            for option in (transform, choices["solver"], choices.get("tune"))
            if option is not None and option not in ("identity", "none")
        ]
        weight = mixed(scheme, "weight")
        group = group_of(scheme.weight)
        auto = settings["format"]["auto"]
        if auto:  # the candidates need not have one group
            weight = f"auto{auto['bits_per_weight']:g}"
            group = None
        top = scheme.part("weight", None, head)
        try:
            name = cls(
                str(section["base"] or base_of(settings["model"])),
                dataset=words.get("dataset"),
                training=words.get("training"),
                peft=words.get("peft"),
                method=".".join(methods) or None,
                weight=weight,
                group=group,
                act=mixed(scheme, "act"),
                kv=16 if scheme.kv is None else word(scheme.kv.part("key")),
                head="fp16" if top is None else word(top),
            )
        except ValueError as error:
            raise ConfigError(f"export.{error}") from None
        if len(str(name)) > LONGEST:
            part = max(("base", *WORDS), key=lambda part: len(getattr(name, part) or ""))
            raise ConfigError(
                f"export.{part}={getattr(name, part)}: the checkpoint's name has {len(str(name))} "
                f"letters with it, and a folder's at most {LONGEST}; set export.{part} to a "
                "shorter one."
            )
        return name


def name_of(snapshot: Snapshot) -> Name:
    """The name under which a snapshot is written."""
    return Name.of(
        snapshot.settings, snapshot.choices, snapshot.scheme, snapshot.adapter.structure.head
    )


def base_of(model: Mapping) -> str | None:
    """What names of a model begin with.

    The last part of its hub id or folder, else the model's own name, if its source gives it one.
    """
    remote = hub_id(model)
    if remote is not None:
        return Path(remote).name
    if model.get("path"):
        return expanded(model["path"]).resolve().name
    return build(model, "model", ModelSource).name


def hub_id(model: Mapping) -> str | None:
    """The hub repository (owner/name) of a `model` section.

    None where it is a folder, or comes from elsewhere.
    """
    path = model.get("path")
    return None if path is None or expanded(path).exists() else path


def _kind(piece: str) -> str:
    """dataset | training | peft, by the word alone."""
    if piece in TRAININGS:
        return "training"
    return "peft" if PEFT.fullmatch(piece) else "dataset"
