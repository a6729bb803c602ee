"""A model -> its Structure, from one recorded forward of a few tokens.

Works on a loaded model and on one without weights (skeleton.py), where both must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from harness.structure.composite import decoder_of, towers_of
from harness.structure.describe import Blocks, dispatched, of_experts
from harness.structure.forward import Forward
from harness.structure.graph import Graph, Product, back, positions, root, source
from harness.structure.joined import joined
from harness.structure.readings import Scores, alone, attentions, norm_before
from harness.structure.residual import Stream
from harness.structure.site import Norm
from harness.structure.structure import Attention, Residual, Structure
from harness.structure.tape import Value


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

    def structure(self) -> Structure:
        """What was derived."""
        count = len(self.model.get_submodule(self.blocks))
        idle = sorted(set(range(count)) - self.forward.passed)
        if idle:
            raise ValueError(f"a text alone does not pass block {idle[0]} of {count}")
        blocks = Blocks(self.model, self.blocks, self.graph, self.norms, self.stream, self.scores)
        return Structure(
            self.model.config.model_type,
            self.blocks,
            self.embedding,
            self.head,
            self._final_norm(),
            self.hidden,
            self.forward.returned,
            self._plain_head(),
            blocks.sites(),
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
            if of_experts(self.model, product) and product.parameter in touched
        ]
        if all(dispatched(self.model, product) for product in apart):
            return residual
        why = (*residual.why, "its experts are not run by transformers' experts interface")
        return replace(residual, group=None, why=why)

    def _final_norm(self) -> Norm | None:
        """The norm before the head."""
        before = norm_before(self.norms, source(self.reads_head.x))
        if before is None:
            return None
        call, module, kind = before
        return Norm(module, kind, True, alone(self.graph, call))

    def _plain_head(self) -> bool:
        """Whether nothing stands between the final norm and the head, and the head and logits."""
        behind = root(self.graph.tape.output[0]) is self.reads_head.output
        return behind and root(self.reads_head.x).call in self.norms

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
