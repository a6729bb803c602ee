"""A model -> its Structure, from one recorded forward of a few tokens.

Works on a loaded model and on one without weights (skeleton.py), where both must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from inspect import signature

from torch import Tensor, nn

from harness.libraries.saved import Saved
from harness.libraries.transformers import runs_experts
from harness.structure.composite import decoder_of, towers_of
from harness.structure.forward import Forward
from harness.structure.graph import SCALINGS, Graph, Product, back, positions, root, scales, source
from harness.structure.joined import joined
from harness.structure.naming import Facts, named
from harness.structure.readings import (
    Reading,
    Scores,
    attention_feed,
    attentions,
    behind,
    choosing,
    norm_before,
    product_feed,
    readings,
    scored,
)
from harness.structure.residual import Stream
from harness.structure.site import Matrix, Norm, Site
from harness.structure.structure import Attention, Residual, Structure
from harness.structure.tape import Call, Value

NARROW = 64  # features: what reads fewer, such as the rank of a gate, costs no bits to speak of


def derive(model) -> Structure:
    """The structure of transformers' language model, on any device, `meta` included."""
    return Derivation(model).structure()


def blocks_of(model) -> str:
    """The absolute name of the list of decoder blocks: the decoder's with the most parameters."""
    inside = set(decoder_of(model).modules())
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if module in inside and isinstance(module, nn.ModuleList) and len(module)
    }
    # lists inside the blocks (experts) are smaller than the list that holds them
    return max(sizes, key=lambda name: sizes[name])


class Derivation:
    """One model on its way to a Structure."""

    def __init__(self, model):
        self.model = model
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.blocks = blocks_of(model)
        self.towers = towers_of(model)
        self.embedding = self.modules[id(model.get_input_embeddings())]
        self.head = self.modules[id(model.get_output_embeddings())]
        self.forward = Forward(model, self.blocks)
        tape = self.forward.tape
        self.graph = Graph(tape)
        self.norms = {
            call: (self.modules[id(call.function)], self.forward.kinds[id(call.function)])
            for call in tape.calls
            if call.op == "leaf"
        }
        self.hidden = model.get_input_embeddings().weight.shape[1]
        self.reads_head = self._head_product()
        self.stream = Stream(self.graph, self.norms, self._final(), self.hidden)
        self.residual = self._residual()
        self.scores = attentions(self.graph)
        self.chosen = choosing(self.graph)
        self.scored = scored(self.graph, self.scores)

    def structure(self) -> Structure:
        """What was derived."""
        count = len(self.model.get_submodule(self.blocks))
        idle = sorted(set(range(count)) - self.forward.passed)
        if idle:
            raise ValueError(f"a text alone does not pass block {idle[0]} of {count}")
        readings_of: list[list[Reading]] = [[] for _ in range(count)]
        for reading in self._readings():
            layer = reading.products[0].call.layer
            if layer is not None:
                readings_of[layer].append(reading)
        sites = tuple(tuple(self._sites(layer, found)) for layer, found in enumerate(readings_of))
        return Structure(
            self.model.config.model_type,
            self.blocks,
            self.embedding,
            self.head,
            self._final_norm(),
            self.hidden,
            self.forward.returned,
            self._plain_head(),
            sites,
            self.residual,
            dict(self._attention()),
            self.towers,
            joined(self.forward),
        )

    def _head_product(self) -> Product:
        """The matrix product that gives the logits."""
        weight = self.forward.names[id(self.model.get_submodule(self.head).weight)]
        found = [p for p in self.graph.products.values() if p.parameter == weight]
        return found[-1]

    def _final(self) -> Value:
        """What enters the final norm, or the head where there is none."""
        value = source(self.reads_head.x)
        if value.call in self.norms:
            return value.call.inputs[0]
        return value

    def _residual(self) -> Residual:
        """What may be done to the residual stream, experts included."""
        residual = self.stream.residual()
        if self.towers:
            why = (*residual.why, f"what {', '.join(self.towers)} give enters it as it is")
            return replace(residual, group=None, why=why)
        touched = {*residual.writers, *residual.readers}
        apart = [
            product
            for product in self.graph.products.values()
            if self._experts(product) and product.parameter in touched
        ]
        if all(map(self._dispatched, apart)):
            return residual
        why = (*residual.why, "its experts are not run by transformers' experts interface")
        return replace(residual, group=None, why=why)

    def _dispatched(self, product: Product) -> bool:
        """Whether experts are run by transformers' interface for them."""
        return runs_experts(self.model.get_submodule(product.parameter.rpartition(".")[0]))

    def _final_norm(self) -> Norm | None:
        """The norm before the head."""
        before = norm_before(self.norms, source(self.reads_head.x))
        if before is None:
            return None
        call, module, kind = before
        return Norm(module, kind, True, self._alone(call))

    def _plain_head(self) -> bool:
        """Whether nothing stands between the final norm and the head, and the head and logits."""
        behind = root(self.graph.tape.output[0]) is self.reads_head.output
        return behind and root(self.reads_head.x).call in self.norms

    def _readings(self) -> Iterator[Reading]:
        """The readings of the blocks, those of experts apart from the others of the same tensor."""
        for reading in readings(self.graph):
            for experts in (False, True):
                products = [p for p in reading.products if self._experts(p) == experts]
                if products:
                    yield Reading(reading.activation, products)

    def _experts(self, product: Product) -> bool:
        return len(self._parameter(product.parameter).shape) > 2

    def _parameter(self, name: str) -> Tensor:
        return self.model.get_parameter(name)

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
                experts=self._experts(first),
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
            alone = self._alone(call)
            norm = Norm(module, kind, residual, alone)
            if kind.gain == "1":
                why = "the norm before it has no gain"
            elif not alone:
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
        start = f"{self.blocks}.{layer}."
        shape = self._parameter(product.parameter).shape
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
        if self._experts(product):
            return self._dispatched(product)
        # another module is put in place of one that is called with what the matrix reads
        owner, _, leaf = product.parameter.rpartition(".")
        called_with = signature(self.model.get_submodule(owner).forward).parameters
        return leaf == "weight" and len(called_with) == 1

    def _alone(self, norm: Call) -> bool:
        """Whether matrix products are all that reads a norm's output, and read it as one tensor."""
        activations: set[Value] = set()
        pending = self.graph.into(norm.outputs[0])
        while pending:
            call = pending.pop()
            product = self.graph.products.get(call.outputs[0])
            if scales(call):  # by a number, for every reader alike
                pending += self.graph.into(call.outputs[0])
            elif product is None:
                return False
            else:
                activations.add(root(product.x))
        return len(activations) == 1

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

    def _attention(self) -> Iterator[tuple[int, Attention]]:
        """The attention of each block that has one."""
        for scores in self.scores:
            layer = scores.call.layer
            if layer is None or scores.query is None or scores.key is None:
                continue
            heads, _, features = scores.query.shape[-3:]
            values = scores.value.shape[-1]
            start = f"{self.blocks}.{layer}."
            found = (name for name in self.forward.attending if name.startswith(start))
            module = next(found, "").removeprefix(start) or None
            why = None if module else "attention is not found by its name in transformers"
            if module and layer in self.forward.otherwise:
                module, why = None, "attention of another name sees other tokens"
            sizes = (features, values)
            yield layer, Attention(heads, self._value_heads(scores), sizes, module, why)

    def _value_heads(self, scores: Scores) -> int:
        """How many heads of values there are, before they are repeated."""
        start, path = back(scores.value, self.graph.products)
        heads, tokens, features = scores.value.shape[-3:]
        try:
            return len(positions(start, path).unique()) // (tokens * features)
        except ValueError:
            return heads
