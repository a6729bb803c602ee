"""The residual stream of a recorded model: who writes it, who reads it, what rotations it bears.

All values that additions, scalings by numbers and moves of whole vectors join to what enters the
final norm are the stream. With h R in place of h the model stays as it is if

    every writer gives        W^T R  (and b R)
    every reader reads        R^T h,  a norm's readers with its gain merged:  W diag(g) R

and norms commute with R: RMS norms for any orthogonal R, LayerNorm for one with R 1 = 1, which
leaves the mean alone. Whatever else writes or reads is a reason against it.
"""

from __future__ import annotations

from collections.abc import Iterable

from harness.structure.graph import (
    FRESH,
    JOINS,
    REDUCTIONS,
    SCALINGS,
    SCATTERS,
    SUMS,
    Graph,
    axes,
    keeps_vectors,
    parameter,
    root,
    scalar,
)
from harness.structure.norms import NormKind
from harness.structure.structure import Residual
from harness.structure.tape import Call, Value


class Stream:
    """The values of the residual stream, and what meets them.

    norms: {call: (module, kind)}; final: the value that enters the final norm, or the head.
    """

    def __init__(
        self, graph: Graph, norms: dict[Call, tuple[str, NormKind]], final: Value, hidden: int
    ):
        self.graph = graph
        self.norms = norms
        self.hidden = hidden
        self._parents: dict[Value, Value] = {}
        self._inner: set[Value] = set()
        self._biases: list[tuple[Value, Value]] = []
        for call in graph.tape.calls:
            for output in call.outputs:
                self._join(call, output)
        stem = self._find(final)
        # in the order of the forward, so that a structure is the same each time
        self.values = dict.fromkeys(v for v in list(self._parents) if self._find(v) is stem)
        self.values[final] = None
        self.writers: dict[str, int] = {}
        self.readers: dict[str, int] = {}
        self.fused: dict[str, list[tuple[str, int]]] = {}
        self.why: list[str] = []

    def _join(self, call: Call, output: Value) -> None:
        """Put a call's output and inputs into one class, where it is a sum of vectors."""
        if not self._wide(output):
            return
        inputs = call.inputs
        vectors = [v for v in inputs if self._wide(v) and parameter(v) is None]
        others = [v for v in inputs if v not in vectors]
        if not vectors:
            return
        alone = len(vectors) == 1
        if keeps_vectors(call) and inputs[0] in vectors:
            joined = [inputs[0]]
        elif call.op in SUMS and not others:
            joined = vectors
        elif call.op in SUMS and alone and all(map(self._bias, others)):
            joined = vectors
            self._biases.append((output, others[0]))
        elif (
            (call.op in SCALINGS and alone and all(map(scalar, others)))
            or call.op in SCATTERS | JOINS
            or (call.op in REDUCTIONS and alone)
        ):
            joined = vectors
        else:
            return
        self._inner.add(output)
        for vector in joined:
            self._parents[self._find(output)] = self._find(vector)

    def _wide(self, value: Value) -> bool:
        return bool(value.shape) and value.shape[-1] == self.hidden

    def _bias(self, value: Value) -> bool:
        return parameter(value) is not None and self._wide(value)

    def _find(self, value: Value) -> Value:
        """The value that stands for the class of this one."""
        self._parents.setdefault(value, value)
        while self._parents[value] is not value:
            self._parents[value] = self._parents[self._parents[value]]
            value = self._parents[value]
        return value

    def residual(self) -> Residual:
        """What may be done to the stream."""
        for value in self.values:
            if value not in self._inner:
                self._written(value)
            for call in self.graph.reading(value):
                if not self._inside(call):
                    self._read(call, value)
        for output, bias in self._biases:
            if output in self.values:
                self._note(self.writers, parameter(bias), (axes(bias) or [None])[-1])
        kinds = {module: kind for module, kind in self.norms.values() if module in self.fused}
        group = "O(n)"
        if any(kind.kind == "layer" for kind in kinds.values()):
            group = "fixes 1"
        why = tuple(sorted(set(self.why)))
        return Residual(
            None if why else group,
            why,
            self.writers,
            self.readers,
            {norm: tuple(dict.fromkeys(readers)) for norm, readers in self.fused.items()},
            kinds,
        )

    def _inside(self, call: Call) -> bool:
        """Whether a call only carries the stream on."""
        return any(output in self.values and output in self._inner for output in call.outputs)

    def _written(self, value: Value) -> None:
        """Note what a value of the stream was made by."""
        call = value.call
        if call is None and value.tensor is not None:
            self.why.append("a table that is no weight writes the residual stream")
        if call is None or call.op in FRESH:
            return
        product = self.graph.products.get(value)
        if product is not None:
            self._note(self.writers, product.parameter, product.writes)
            if product.bias is not None:
                self._note(self.writers, product.bias, 0)
        elif call.op == "embedding":
            table = next(filter(None, map(parameter, call.inputs)), None)
            self._note(self.writers, table, 1)
        elif call in self.norms:
            self._written_by_norm(call)
        else:
            self.why.append(f"{call.op} writes the residual stream")

    def _written_by_norm(self, call: Call) -> None:
        """A norm in the stream: one without a gain commutes, and what it reads writes instead."""
        _, kind = self.norms[call]
        source = root(call.inputs[0])
        written = source in self.graph.products or _op(source) == "embedding"
        if kind == NormKind("rms", "1", False) and written:
            self._written(source)
            return
        self.why.append("a norm writes the residual stream, and no rotation passes its gain")

    def _read(self, call: Call, value: Value) -> None:
        """Note what reads the stream."""
        product = self.graph.products.get(call.outputs[0])
        if product is not None and product.x is value:
            self._note(self.readers, product.parameter, product.reads)
        elif call in self.norms:
            self._read_by_norm(call)
        elif call.op != "index_add_":
            self.why.append(f"{call.op} reads the residual stream")

    def _read_by_norm(self, call: Call) -> None:
        """A norm's gain goes into what reads it, so that has to be matrix products alone."""
        module, _ = self.norms[call]
        readers = self.fused.setdefault(module, [])
        for reader in self._readers(call.outputs[0]):
            if isinstance(reader, str):
                self.why.append(reader)
            else:
                readers.append(reader)
                self._note(self.readers, *reader)

    def _readers(self, value: Value) -> Iterable[tuple[str, int] | str]:
        """(parameter, axis) of the products that read a norm, or a reason why that is not all."""
        for call in self.graph.into(value):
            product = self.graph.products.get(call.outputs[0])
            wide = [v for v in call.inputs if self._wide(v)]
            others = [v for v in call.inputs if v not in wide]
            if product is not None and root(product.x) is root(value):
                yield product.parameter, product.reads
            elif call.op in SCALINGS and len(wide) == 1 and all(map(scalar, others)):
                # a router may weigh the experts' input
                yield from self._readers(call.outputs[0])
            elif call.outputs[0] in self.values:
                yield "a norm writes the residual stream, and no rotation passes its gain"
            elif call.op not in SCATTERS:
                yield f"{call.op} reads a norm of the residual stream"

    def _note(self, noted: dict[str, int], name: str | None, axis: int | None) -> None:
        """Note a parameter that takes the rotation, at an axis."""
        if name is None or axis is None:
            self.why.append("something without a plain matrix writes or reads the residual stream")
        else:
            noted[name] = axis


def _op(value: Value) -> str:
    """The name of what made a value."""
    return "" if value.call is None else value.call.op
