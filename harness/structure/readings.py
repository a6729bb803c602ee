"""The readings of a recorded model: what matrix products read, and what that comes from."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.structure.graph import (
    JOINS,
    MOVES,
    PRODUCTS,
    SCALINGS,
    SUMS,
    Graph,
    Product,
    back,
    parameter,
    positions,
    root,
    scales,
)
from harness.structure.norms import NormKind
from harness.structure.site import Feed
from harness.structure.tape import Call, Value

CHOICES = {"topk", "argmax", "sort"}
ATTENTION = "scaled_dot_product_attention"


@dataclass(eq=False)
class Scores:
    """One attention: softmax of scores, times values. query, key: None where they are not seen."""

    call: Call
    value: Value
    query: Value | None = None
    key: Value | None = None


@dataclass(eq=False)
class Reading:
    """One activation with the products that read it, in the order of the forward."""

    activation: Value
    products: list[Product] = field(default_factory=list)


def readings(graph: Graph) -> list[Reading]:
    """The activations of a model that matrix products read, in the order of the forward."""
    found: dict[Value, Reading] = {}
    for product in graph.products.values():
        source = root(product.x)
        found.setdefault(source, Reading(source)).products.append(product)
    return list(found.values())


def choosing(graph: Graph) -> set[Value]:
    """The outputs of products that only choose: what a top-k sees, and gates of one number."""
    outputs = {output for output in graph.products if output.shape[-1] == 1}
    chosen = [v for call in graph.tape.calls if call.op in CHOICES for v in call.inputs]
    return outputs | _products(graph, chosen, norms=False)


def scored(graph: Graph, scores: list[Scores]) -> set[Value]:
    """The outputs of products that queries and keys are made of."""
    factors = [value for each in scores for value in (each.query, each.key) if value is not None]
    return _products(graph, factors, norms=True)


def _products(graph: Graph, pending: list[Value], norms: bool) -> set[Value]:
    """The outputs of the products that values are next computed from, through norms or not."""
    outputs: set[Value] = set()
    seen: set[Value] = set()
    while pending:
        value = pending.pop()
        if value in seen or value.call is None:
            continue
        seen.add(value)
        if value in graph.products:
            outputs.add(value)
        elif norms or value.call.op != "leaf":
            pending += value.call.inputs
    return outputs


def attentions(graph: Graph) -> list[Scores]:
    """Where a model attends: torch's attention, or a softmax times values."""
    found = []
    for call in graph.tape.calls:
        inputs = call.inputs
        if call.op == ATTENTION:
            found.append(Scores(call, inputs[2], inputs[0], inputs[1]))
        elif call.op in PRODUCTS and len(inputs) == 2 and not any(map(parameter, inputs)):
            weights = _through_softmax(inputs[0])
            if weights is not None:
                query, key = _scored(weights)
                found.append(Scores(call, inputs[1], query, key))
    return found


def _through_softmax(value: Value) -> Call | None:
    """The softmax whose output a value is, moved."""
    end, _ = back(value, set())
    return end.call if end.call is not None and end.call.op == "softmax" else None


def _scored(softmax: Call) -> tuple[Value | None, Value | None]:
    """(queries, keys) of the scores that a softmax reads."""
    value = softmax.inputs[0]
    for _ in range(16):  # scaled, masked, capped; never so often
        call = value.call
        if call is None:
            break
        if call.op in PRODUCTS and len(call.inputs) >= 2:
            query, key = call.inputs[-2:]
            return query, key
        # the first input of torch.where is the mask
        inputs = call.inputs[1:] if call.op == "where" else call.inputs
        if not inputs:
            break
        value = inputs[0]
    return None, None


def attention_feed(graph: Graph, scores: Scores, activation: Value) -> Feed | str:
    """What makes the site behind an attention; a reason where no plain matrix does."""
    output = scores.call.outputs[0]
    end, path = back(activation, {output})
    if end is not output:
        return "something between attention and its output projection is no move"
    source, way = back(scores.value, graph.products)
    if source not in graph.products:
        name = source.call.op if source.call is not None else "nothing"
        return f"values come from {name}, not from a matrix"
    product = graph.products[source]
    try:
        # one token: [heads, features of a value] -> rows of the matrix
        values = positions(source, way) % source.shape[-1]
        places = positions(output, path).reshape(-1, activation.shape[-1])[0]
    except (ValueError, RuntimeError, TypeError):
        return "values are moved by computed positions"
    heads, tokens, features = output.shape[-3:]
    head = places // (tokens * features) % heads
    feature = places % features
    values = values.reshape(-1, *values.shape[-3:])[0]
    if values.shape[0] != heads:  # torch's attention may repeat the value heads by itself
        values = values.repeat_interleave(heads // values.shape[0], dim=0)
    rows = values[head, 0, feature]
    outputs = source.shape[-1]
    return Feed(product.parameter, tuple(rows.tolist()), outputs, "heads", heads)


def product_feed(graph: Graph, activation: Value) -> Feed | str:
    """What makes a site that is a product of two activations, elementwise."""
    call = activation.call
    if call is None or call.op not in SCALINGS:
        return f"{'nothing' if call is None else call.op} stands before it"
    for factor in reversed(call.inputs):
        if factor.shape != activation.shape:
            continue
        source, path = back(factor, graph.products)
        if source not in graph.products:
            continue
        try:
            places = positions(source, path) % source.shape[-1]
        except (ValueError, RuntimeError, TypeError):
            continue
        rows = places.reshape(-1, activation.shape[-1])[0]
        product = graph.products[source]
        outputs = source.shape[-1]
        return Feed(product.parameter, tuple(rows.tolist()), outputs, "product")
    return "neither factor is a matrix's output"


def norm_before(
    norms: dict[Call, tuple[str, NormKind]], activation: Value
) -> tuple[Call, str, NormKind] | None:
    """The norm whose output an activation is."""
    call = activation.call
    if call is None or call not in norms:
        return None
    module, kind = norms[call]
    return call, module, kind


def alone(graph: Graph, norm: Call) -> bool:
    """Whether matrix products are all that reads a norm's output, and read it as one tensor."""
    activations: set[Value] = set()
    pending = graph.into(norm.outputs[0])
    while pending:
        call = pending.pop()
        product = graph.products.get(call.outputs[0])
        if scales(call):  # by a number, for every reader alike
            pending += graph.into(call.outputs[0])
        elif product is None:
            return False
        else:
            activations.add(root(product.x))
    return len(activations) == 1


def behind(graph: Graph, value: Value, scores: list[Scores]) -> Scores | None:
    """The attention that a value comes from: moved, gated, normed, joined with another one."""
    outputs = {each.call.outputs[0]: each for each in scores}
    for _ in range(8):
        end, _ = back(value, outputs)
        if end in outputs:
            return outputs[end]
        call = end.call
        if call is None or call.op not in SCALINGS | SUMS | JOINS | MOVES | {"leaf"}:
            return None
        value = call.inputs[0]
    return None
