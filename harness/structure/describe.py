"""The sites of a recorded model's blocks: their names, matrices, and what stands before them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from inspect import signature

from harness.libraries.saved import Saved
from harness.libraries.transformers import runs_experts
from harness.structure.graph import SCALINGS, Graph, Product, root, source
from harness.structure.naming import Facts, named
from harness.structure.norms import NormKind
from harness.structure.readings import (
    Reading,
    Scores,
    alone,
    attention_feed,
    behind,
    choosing,
    norm_before,
    product_feed,
    readings,
    scored,
)
from harness.structure.residual import Stream
from harness.structure.site import Matrix, Norm, Site
from harness.structure.tape import Call, Value

NARROW = 64  # features: what reads fewer, such as the rank of a gate, costs no bits to speak of


def of_experts(model, product: Product) -> bool:
    """Whether a weight holds a matrix of each routed expert."""
    return len(model.get_parameter(product.parameter).shape) > 2


def dispatched(model, product: Product) -> bool:
    """Whether experts are run by transformers' interface for them."""
    return runs_experts(model.get_submodule(product.parameter.rpartition(".")[0]))


class Blocks:
    """The blocks of one model, as its recorded forward shows them.

    name: of the list of them. norms: {call: (module, kind)}. scores: of all that attend.
    """

    def __init__(
        self,
        model,
        name: str,
        graph: Graph,
        norms: dict[Call, tuple[str, NormKind]],
        stream: Stream,
        scores: list[Scores],
    ):
        self.model = model
        self.name = name
        self.graph = graph
        self.norms = norms
        self.stream = stream
        self.scores = scores
        self.chosen = choosing(graph)
        self.scored = scored(graph, scores)

    def sites(self) -> tuple[tuple[Site, ...], ...]:
        """The sites of every block, in the order of its forward."""
        found: list[list[Reading]] = [[] for _ in self.model.get_submodule(self.name)]
        for reading in self._readings():
            layer = reading.products[0].call.layer
            if layer is not None:
                found[layer].append(reading)
        return tuple(tuple(self._sites(layer, each)) for layer, each in enumerate(found))

    def _readings(self) -> Iterator[Reading]:
        """The readings of the blocks, those of experts apart from the others of the same tensor."""
        for reading in readings(self.graph):
            for experts in (False, True):
                products = [p for p in reading.products if of_experts(self.model, p) == experts]
                if products:
                    yield Reading(reading.activation, products)

    def _sites(self, layer: int, found: list[Reading]) -> Iterator[Site]:
        """The sites of one block."""
        scores = [each for each in self.scores if each.call.layer == layer]
        attended = min((each.call.position for each in scores), default=None)
        names: dict[Value, str] = {}
        taken: list[str] = []
        sites: list[tuple[int, Site]] = []
        for reading in sorted(found, key=lambda one: one.products[0].call.position):
            site = self._site(layer, reading, scores)
            first = reading.products[0]
            facts = Facts(
                reader=site.matrices[0].name,
                residual=site.residual,
                attended=not site.residual
                and behind(self.graph, reading.activation, scores) is not None,
                exits=any(self._exits(product.output) for product in reading.products),
                experts=of_experts(self.model, first),
                early=attended is not None and first.call.position < attended,
                attends=attended is not None,
                source=self._source(reading.activation, names),
                shared=reading.activation in names,
            )
            name = named(facts, taken)
            taken.append(name)
            names.setdefault(reading.activation, name)
            site = replace(site, name=name, activation=names[reading.activation])
            sites.append((self._reached(reading), site))
        # a router may read a tensor long before the matrices do that are quantized
        yield from (site for _, site in sorted(sites, key=lambda placed: placed[0]))

    def _reached(self, reading: Reading) -> int:
        """The position of the first call that reads an activation to be quantized."""
        quantized = filter(self._quantizable, reading.products)
        return next(quantized, reading.products[0]).call.position

    def _site(self, layer: int, reading: Reading, scores: list[Scores]) -> Site:
        """A site without its name."""
        activation = source(reading.activation)
        matrices = tuple(
            dict.fromkeys(self._matrix(layer, product) for product in reading.products)
        )
        before = norm_before(self.norms, activation)
        norm = feed = why = None
        residual = activation in self.stream.values
        if before is not None:
            call, module, kind = before
            inside = root(call.inputs[0]) in self.stream.values
            residual = inside or call.inputs[0] in self.stream.values
            norm = Norm(module, kind, residual, alone(self.graph, call))
            if kind.gain == "1":
                why = "the norm before it has no gain"
            elif not norm.alone:
                why = "something else reads the norm before it"
        elif residual:
            why = "it is the residual stream itself"
        else:
            attention = behind(self.graph, activation, scores)
            result = (
                product_feed(self.graph, activation)
                if attention is None
                else attention_feed(self.graph, attention, activation)
            )
            if isinstance(result, str):
                why = result
            else:
                feed = result
        width = activation.shape[-1]
        return Site("", layer, matrices, width, norm, feed, residual, why)

    def _matrix(self, layer: int, product: Product) -> Matrix:
        """What a product reads, as a matrix of its block."""
        start = f"{self.name}.{layer}."
        shape = self.model.get_parameter(product.parameter).shape
        parts = ()
        if len(shape) > 2:
            rows = shape[product.writes]
            parts = self._saved.parts(product.parameter, shape[0], rows, product.reads == 1)
        return Matrix(
            product.parameter.removeprefix(start).removesuffix(".weight"),
            product.parameter,
            product.reads,
            product.writes,
            product.bias,
            shape[0] if len(shape) > 2 else None,
            self._quantizable(product),
            product.call.op == "linear",
            parts,
            product.output in self.scored,
        )

    @cached_property
    def _saved(self) -> Saved:
        """What files call the model's tensors."""
        return Saved(self.model)

    def _quantizable(self, product: Product) -> bool:
        """Whether a matrix does more than choose, and is used by way of its module."""
        # a weight that is multiplied from the left is used without its module
        if product.output in self.chosen or product.from_left:
            return False
        if product.x.shape[-1] < NARROW:
            return False
        if of_experts(self.model, product):
            return dispatched(self.model, product)
        # another module is put in place of one that is called with what the matrix reads
        owner, _, leaf = product.parameter.rpartition(".")
        called_with = signature(self.model.get_submodule(owner).forward).parameters
        return leaf == "weight" and len(called_with) == 1

    def _exits(self, value: Value, norms: int = 1) -> bool:
        """Whether a product's output is added to the residual stream, through a norm or not."""
        if value in self.stream.values:
            return True
        for call in self.graph.into(value):
            through = call in self.norms and norms > 0
            if call.op in SCALINGS and self._exits(call.outputs[0], norms):
                return True
            if through and self._exits(call.outputs[0], norms - 1):
                return True
        return False

    def _source(self, activation: Value, names: dict[Value, str]) -> str | None:
        """The site of the block that an activation is computed from."""
        pending = [activation]
        seen: set[Value] = set()
        while pending:
            value = pending.pop(0)
            if value in seen or value.call is None:
                continue
            seen.add(value)
            product = self.graph.products.get(value)
            if product is None:
                pending += value.call.inputs
            elif root(product.x) in names:
                return names[root(product.x)]
        return None
