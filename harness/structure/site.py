"""What a site is: one activation tensor with the matrices that read it, and what stands before it.

Before a site stands a norm, the matrix that feeds it by a linear path, or neither of the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness.structure.norms import NormKind


@dataclass(frozen=True)
class Matrix:
    """A weight that a matrix product reads.

    name: block-relative name of its module (of the parameter, where a module has several);
    parameter, bias: absolute names. reads, writes: the parameter's axes that are summed over and
    that come out; experts: how many a third axis counts. quantize: False where what it gives only
    chooses (a router, a gate of one number) and of what reads very few features: that stays float.
    plain: it is torch's own linear. parts: the matrices in which files hold each expert's, by the
    absolute names of their modules (with * for its number) and by its rows; none where files hold
    all experts in one tensor. scored: queries or keys are made of what it gives.
    """

    name: str
    parameter: str
    reads: int
    writes: int
    bias: str | None = None
    experts: int | None = None
    quantize: bool = True
    plain: bool = True
    parts: tuple[tuple[str, range], ...] = ()
    scored: bool = False


@dataclass(frozen=True)
class Norm:
    """A norm right before a site.

    module: its absolute name. alone: whether nothing but the site's matrices reads it, so that its
    gain may be merged into them.
    """

    module: str
    kind: NormKind
    residual: bool
    alone: bool


@dataclass(frozen=True)
class Feed:
    """The matrix whose outputs make a site by a linear path.

    rows: which of its `outputs` each feature of the site is. through: heads (values, weighed by
    attention: the features of one head may be mixed) | product (multiplied elementwise: each
    feature for itself).
    """

    matrix: str
    rows: tuple[int, ...]
    outputs: int
    through: str
    heads: int = 1

    @property
    def grouped(self) -> tuple[int, int] | None:
        """(value heads, query heads on each) where the features are those heads in order."""
        if self.through != "heads":
            return None
        size = len(self.rows) // self.heads
        rank = {row: index for index, row in enumerate(self.written)}
        values = len(rank) // size
        repeat = self.heads // values
        plain = [
            value * size + feature
            for value in range(values)
            for _ in range(repeat)
            for feature in range(size)
        ]
        return (values, repeat) if plain == [rank[row] for row in self.rows] else None

    @property
    def partial(self) -> tuple[int, ...] | None:
        """`written`, or None where that is every output in its order."""
        return None if self.written == tuple(range(self.outputs)) else self.written

    @property
    def written(self) -> tuple[int, ...]:
        """The matrix's outputs that the site is made of, each once, in the order of features."""
        return tuple(dict.fromkeys(self.rows))


@dataclass(frozen=True)
class Site:
    """One activation tensor of a block.

    residual: whether it is the residual stream itself, behind a norm or as it is.
    why: why no scale can be merged into what comes before it; None where one can.
    activation: the site whose tensor experts are given rows of, by the router; its own name of any
    other site. expert: whose site it is, of those that `expanded` gives.
    """

    name: str
    layer: int | None
    matrices: tuple[Matrix, ...]
    width: int
    norm: Norm | None = None
    feed: Feed | None = None
    residual: bool = False
    why: str | None = None
    activation: str = ""
    expert: int | None = None

    @property
    def merges(self) -> bool:
        """Whether what stands before it can take a matrix (of heads) or a scale."""
        if self.expert is not None or self.experts:  # the others read it too, or the router does
            return False
        if self.feed is not None and self.feed.through == "heads":
            return self.turns
        return self.why is None

    @property
    def turns(self) -> bool:
        """Whether what stands before it can take a matrix of each head."""
        return self.feed is not None and self.feed.grouped is not None

    @property
    def experts(self) -> int:
        """How many experts read it, each by itself; 0 of any other site."""
        first = self.matrices[0]
        return first.experts if first.quantize and first.experts else 0

    def names(self, matrix: Matrix) -> list[str]:
        """The block-relative names of a matrix, one for each expert."""
        if not self.experts:
            return [matrix.name]
        return [f"{matrix.name}.{expert}" for expert in range(self.experts)]

    def of(self, expert: int) -> Site:
        """The site of one expert."""
        matrices = tuple(
            replace(
                matrix,
                name=f"{matrix.name}.{expert}",
                experts=None,
                parts=tuple((name.replace("*", str(expert)), rows) for name, rows in matrix.parts),
            )
            for matrix in self.matrices
        )
        return replace(self, name=f"{self.name}.{expert}", matrices=matrices, expert=expert)

    @property
    def linears(self) -> tuple[str, ...]:
        """Block-relative names of what is quantized here."""
        return tuple(matrix.name for matrix in self.matrices if matrix.quantize)
