"""Placement: the matrices of a transform by place; Role: what a parameter reads and writes.

residual    the stream h: the embedding and the last linear of every branch write h R, every
            norm's readers absorb R
merged      a site's codec whose encoder goes into what feeds the site: the norm's weight (a
            Diagonal), v's rows, up's rows (a Diagonal: the gate multiplies elementwise)
online      a site's codec whose encoder runs before the activation quantizer
query_key   on queries and keys after RoPE; it cancels in their product
encoders    (layer, linear) -> the codec with which this linear writes the residual stream,
            instead of `residual`
decoders    (layer, linear) -> the codec with which this linear undoes all that encodes its
            input
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.codecs.codec import Codec
from harness.codecs.composed import Chain, Repeated, Rows

Where = tuple[int | None, str]
HEAD_SITE = "head_in"  # what the output head reads; it stands outside the blocks, under layer None


@dataclass(frozen=True)
class Placement:
    """Codecs by place.

    A site key is (layer, site), or (None, site) for that site of every block; `notes` are facts the
    choice settled (a block size picked by `auto`, losses before and after learning), and stand in
    the result. clips: {(layer, linear): {"act", "weight": ratio in (0, 1]}}, by which the ranges of
    integer formats were learned to be shrunk there (Scheme.clipped); tensors [] while they are.
    """

    residual: Codec | None = None
    merged: Mapping[Where, Codec] = field(default_factory=dict)
    online: Mapping[Where, Codec] = field(default_factory=dict)
    query_key: Codec | None = None
    encoders: Mapping[Where, Codec] = field(default_factory=dict)
    decoders: Mapping[Where, Codec] = field(default_factory=dict)
    notes: Mapping[str, object] = field(default_factory=dict)
    clips: Mapping[Where, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing changes."""
        single = self.residual or self.query_key
        keyed = self.merged or self.online or self.encoders or self.decoders
        return not (single or keyed)

    def encoder(self, layer: int | None, site: str | None) -> Codec | None:
        """What runs online at a site, or None where the activation is read as it is."""
        return _at(self.online, layer, site)

    def reading(self, role: Role) -> Codec | None:
        """The codec of everything that encodes what this weight reads."""
        override = self.decoders.get((role.layer, role.name))
        if override is not None:
            return override
        # in the order in which they encode
        chain = [
            self.residual if role.reads_residual else None,
            self._merged(role.layer, role.reads, role.heads),
            self.encoder(role.layer, role.reads) if role.swapped else None,
        ]
        codecs = [codec for codec in chain if codec is not None]
        if len(codecs) > 1:
            return Chain(codecs)
        return codecs[0] if codecs else None

    def writing(self, role: Role) -> Codec | None:
        """The codec whose encoder this weight, bias, norm weight or embedding takes over."""
        if role.writes == "residual":
            return self.encoders.get((role.layer, role.name), self.residual)
        codec = self._merged(role.layer, role.writes, None)
        return codec if codec is None or role.rows is None else Rows(codec, role.rows)

    def _merged(
        self, layer: int | None, site: str | None, heads: tuple[int, int] | None
    ) -> Codec | None:
        codec = _at(self.merged, layer, site)
        if codec is None or heads is None:
            return codec
        return Repeated(codec, *heads)


@dataclass(frozen=True)
class Role:
    """Where one linear, norm or embedding stands.

    layer, name: block index and block-relative name (None and the absolute name outside the
    blocks). kind: linear | norm | embedding. reads: the site read (linears). reads_residual:
    whether that is the residual stream, behind a norm or not (of a norm: whether it has a bias,
    which is turned as the stream is). writes: "residual", the site it feeds
    by a linear path, or None. heads: (key/value heads, query heads on each) for what reads the
    heads' values. rows: of its outputs those that feed the site; None: all, in their order. gain:
    what a norm multiplies by, its weight `w` or `1+w`. swapped: whether a linear reads what is
    encoded at its site; a router reads it as it is.
    """

    layer: int | None
    name: str
    kind: str
    reads: str | None = None
    reads_residual: bool = False
    writes: str | None = None
    heads: tuple[int, int] | None = None
    rows: tuple[int, ...] | None = None
    gain: str = "w"
    swapped: bool = True


def _at(codecs: Mapping[Where, Codec], layer: int | None, site: str | None) -> Codec | None:
    """The codec at a site of a block, its own before that of every block."""
    if site is None:  # a role that reads or writes nothing
        return None
    return codecs.get((layer, site), codecs.get((None, site)))
