"""A Structure as tables: what may be done to a model, and the sites of each kind of block."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.structure.norms import NormKind
from harness.structure.site import Matrix, Site
from harness.structure.structure import Attention, Structure

WIDE = 10_000  # columns of a file or a pipe, which have no width of their own
ROTATIONS = {"O(n)": "any rotation", "fixes 1": "one that leaves the vector of ones alone"}
NORMS = {"rms": "RMS norm", "layer": "LayerNorm"}
GAINS = {"w": "gain w", "1+w": "gain 1 + w", "1": "no gain"}
Row = Sequence[str]


def print_structure(structure: Structure) -> None:
    """A line about the model, what may be done to it, then a table for each kind of block."""
    console = terminal()
    line(console, header(structure))
    if structure.towers:
        line(console, f"beside it, and left as it is: {', '.join(structure.towers)}")
    print_table(console, ("", "where", "why not elsewhere"), allowed(structure))
    for layers, attention, rows in kinds(structure):
        line(console, f"\n{'blocks' if len(layers) > 1 else 'block'} {ranges(layers)}: {attention}")
        print_table(console, ("site", "width", "read by", "behind", "scale"), rows)


def terminal() -> Console:
    """Standard output, as wide as need be where it is no terminal."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return Console()
    return Console(width=WIDE)


def line(console: Console, text: str) -> None:
    """A line of which nothing is taken for markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_table(console: Console, columns: Iterable[str], rows: Iterable[Row]) -> None:
    """A table of texts."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column == "width"
        table.add_column(Text(column), overflow="fold", justify="right" if right else "left")
    for texts in rows:
        table.add_row(*map(Text, texts))
    console.print(table)


def header(structure: Structure) -> str:
    """Architecture, sizes, and what stands outside the blocks."""
    parts = [
        f"{structure.layers} blocks in {structure.blocks}",
        f"residual stream of {structure.hidden} features",
        f"embedding {structure.embedding}",
        f"head {structure.head}",
    ]
    if structure.final_norm is not None:
        norm = structure.final_norm
        parts.append(f"final norm {norm.module} ({norm_text(norm.kind)})")
    return f"{structure.architecture}: {', '.join(parts)}"


def allowed(structure: Structure) -> Iterator[Row]:
    """(what may be done, where, why not elsewhere)."""
    if structure.joined:
        yield "quantization", "refused", "\n".join(structure.joined)
    yield _r1(structure)
    yield _r2(structure)
    yield from _attending(structure)
    everywhere = range(structure.layers)
    fed = {layer for layer in everywhere if "down_in" in _quantized(structure, layer)}
    yield _blocks("R4", everywhere, dict.fromkeys(set(everywhere) - fed, "no down_in"))
    yield "online blocks", "every site", ""
    for name in structure.widths:
        layers = [layer for layer in everywhere if name in _quantized(structure, layer)]
        reasons = {layer: _unscaled(structure, name, layer) for layer in layers}
        refused = {layer: why for layer, why in reasons.items() if why is not None}
        yield _blocks(f"smoothing {name}", layers, refused)


def _r1(structure: Structure) -> Row:
    """A rotation of the residual stream."""
    residual = structure.residual
    if residual.group is None:
        return "R1", "refused", "\n".join(residual.why)
    centred = "a norm subtracts the mean" if residual.group == "fixes 1" else ""
    return "R1", ROTATIONS[residual.group], centred


def _r2(structure: Structure) -> Row:
    """A rotation of values, merged into what makes them."""
    sizes = _head_sizes(structure)
    if sizes:
        return "R2", "refused", sizes
    refused: dict[int, str] = {}
    for layer in set(range(structure.layers)) - set(structure.turns):
        if layer not in structure.attention:
            refused[layer] = "no attention"
        else:
            refused[layer] = _unscaled(structure, "o_in", layer) or "values are normed"
    return _blocks("R2", range(structure.layers), refused)


def _attending(structure: Structure) -> Iterator[Row]:
    """What is put between queries, keys and values, which all blocks that attend have to let in."""
    attention = structure.attention
    refused = {layer: each.why or "" for layer, each in attention.items() if each.module is None}
    why = "\n".join(_by_reason(refused)) or "no block attends"
    where = f"{len(attention) - len(refused)} of {len(attention)} attention blocks"
    whole = structure.unmet is None
    sizes = _head_sizes(structure)
    if whole and sizes:
        yield "R3", "refused", sizes
    for what in ("KV cache",) if whole and sizes else ("R3", "KV cache"):
        yield (what, where, "") if whole else (what, f"refused: {where}", why)


def _head_sizes(structure: Structure) -> str:
    """Why no one rotation fits all heads; empty where it does."""
    sizes = sorted({each.features for each in structure.attention.values()})
    return f"heads have {len(sizes)} sizes" if len(sizes) > 1 else ""


def _blocks(what: str, layers: Sequence[int], refused: Mapping[int, str]) -> Row:
    """`2 of 3 blocks`, and the reasons of the others."""
    why = "\n".join(_by_reason(refused))
    return what, f"{len(layers) - len(refused)} of {len(layers)} blocks", why


def _by_reason(refused: Mapping[int, str]) -> list[str]:
    """`0-2: no attention`, a line for each reason."""
    by_reason: dict[str, list[int]] = {}
    for layer in sorted(refused):
        by_reason.setdefault(refused[layer], []).append(layer)
    return [f"{ranges(layers)}: {reason}" for reason, layers in by_reason.items()]


def _quantized(structure: Structure, layer: int) -> set[str]:
    """The activations of a block that what is quantized reads."""
    return {site.activation for site in structure.sites[layer] if site.linears}


def _unscaled(structure: Structure, name: str, layer: int) -> str | None:
    """Why nothing before a site takes a matrix or a scale; None where something does."""
    site = structure.site(name, layer)
    if site is None:
        return f"no {name}"
    if site.merges:
        return None
    if site.experts:
        return "each expert reads it by itself"
    return site.why or "its features are not whole heads in order"


def kinds(structure: Structure) -> Iterator[tuple[list[int], str, tuple[Row, ...]]]:
    """(layers, their attention, a row for each site) of blocks that are alike."""
    for layers in structure.kinds:
        alike: dict[tuple[str, tuple[Row, ...]], list[int]] = {}
        for layer in layers:
            attention = attention_text(structure.attention.get(layer))
            rows = tuple(site_row(structure, layer, site) for site in structure.sites[layer])
            alike.setdefault((attention, rows), []).append(layer)
        for (attention, rows), same in alike.items():
            yield same, attention, rows


def attention_text(attention: Attention | None) -> str:
    """Heads and their sizes."""
    if attention is None:
        return "no attention"
    query, value = attention.features
    features = f"{query} features"
    if query != value:
        features = f"{query} features of queries and keys, {value} of values"
    heads = f"{attention.heads} heads, {attention.kv_heads} KV heads, {features}"
    return f"attention of {heads} ({attention.module or 'not to be replaced'})"


def site_row(structure: Structure, layer: int, site: Site) -> Row:
    """name, width, read by, behind, scale."""
    start = f"{structure.blocks}.{layer}."
    shared = site.activation != site.name
    name = f"{site.name} (of {site.activation})" if shared else site.name
    readers = "\n".join(map(reader_text, site.matrices))
    if shared:
        scale = f"as {site.activation}"
    elif site.name in _quantized(structure, layer):
        scale = _unscaled(structure, site.name, layer) or "merges"
    else:
        scale = "nothing is quantized"
    return name, str(site.width), readers, behind_text(site, start), scale


def reader_text(matrix: Matrix) -> str:
    """`mlp.experts.down_proj x 8`; a router is float."""
    experts = f" x {matrix.experts}" if matrix.experts else ""
    return f"{matrix.name}{experts}{'' if matrix.quantize else ' (float)'}"


def behind_text(site: Site, start: str) -> str:
    """The norm before a site, or the matrix that feeds it. start: of names inside the block."""
    if site.norm is not None:
        return f"{norm_text(site.norm.kind)}: {site.norm.module.removeprefix(start)}"
    if site.feed is not None:
        feed = site.feed
        matrix = feed.matrix.removeprefix(start).removesuffix(".weight")
        part = f" ({len(feed.written)} of {feed.outputs} outputs)" if feed.partial else ""
        return f"{matrix}{part} through {feed.through}"
    return "residual stream" if site.residual else ""


def norm_text(kind: NormKind) -> str:
    """`RMS norm, gain 1 + w`."""
    return f"{NORMS[kind.kind]}, {GAINS[kind.gain]}{', bias' if kind.bias else ''}"


def ranges(layers: Iterable[int]) -> str:
    """`0-2, 5`."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
