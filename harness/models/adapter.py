"""Model families as data: blocks, the linears that read one activation, and what feeds them.

A *site* is one activation tensor with the linears that read it. A decoder block is a chain of
residual *branches* `h <- h + module(norm(h))`; each branch has an entry site (read right after the
norm) and an exit site (read by the last linear of the branch). Nothing else of the project knows a
module name.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

from harness.codecs.placement import HEAD_SITE
from harness.config.checks import nearest
from harness.config.errors import ConfigError
from harness.formats import Scheme
from harness.transforms import ModelShape, Role


@dataclass(frozen=True)
class Site:
    """One activation tensor: `linears` are block-relative module names that read it, `features`
    what its width follows from (hidden, heads = heads * head_dim, intermediate), `fed_by` the
    linears whose outputs make it by a linear path (v feeds o; up feeds down), `norm` the norm right
    before it (None inside a branch).
    """

    name: str
    linears: tuple[str, ...]
    features: str
    norm: str | None = None
    fed_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Branch:
    """`h <- h + module(norm(h))`.

    `context` says whether the module takes the positional arguments of attention.
    """

    module: str
    entry: Site
    exit: Site
    context: bool = False


@dataclass(frozen=True)
class Family:
    """A decoder architecture: block-relative branches and the absolute names of what stands outside
    the blocks.
    """

    name: str
    branches: tuple[Branch, ...]
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites of a block in the order in which the forward reaches them."""
        return tuple(site for branch in self.branches for site in (branch.entry, branch.exit))

    def widths(self, facts: Mapping) -> dict[str, int]:
        """{site: features} from the facts of a config.json.

        Heads * head_dim need not be hidden_size (Qwen3).
        """
        sizes = {
            "hidden": facts["hidden_size"],
            "heads": facts["num_attention_heads"] * head_dim(facts),
            "intermediate": facts["intermediate_size"],
        }
        return {site.name: sizes[site.features] for site in self.sites}

    def roles(self, facts: Mapping) -> dict[str, Role]:
        """{absolute module name: Role} of every embedding, norm and linear that a codec may be
        merged into.
        """
        kv_heads = facts.get("num_key_value_heads") or facts["num_attention_heads"]
        heads = (kv_heads, facts["num_attention_heads"] // kv_heads)
        roles = {self.embedding: Role(None, self.embedding, "embedding", writes="residual")}
        for layer in range(facts["num_hidden_layers"]):
            for branch in self.branches:
                into = branch.entry
                out = branch.exit
                assert into.norm is not None, "an entry is read right after a norm"
                within = [Role(layer, into.norm, "norm", writes=into.name)]
                for name in into.linears:
                    feeds = out.name if name in out.fed_by else None
                    within.append(
                        Role(layer, name, "linear", into.name, reads_residual=True, writes=feeds)
                    )
                for name in out.linears:
                    repeated = heads if out.features == "heads" else None
                    within.append(
                        Role(layer, name, "linear", out.name, writes="residual", heads=repeated)
                    )
                roles |= {f"{self.blocks}.{layer}.{role.name}": role for role in within}
        roles[self.final_norm] = Role(None, self.final_norm, "norm", writes=HEAD_SITE)
        roles[self.head] = Role(None, self.head, "linear", HEAD_SITE, reads_residual=True)
        return roles


def head_dim(facts: Mapping) -> int:
    """Features of one attention head."""
    return facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"]


def shape_of(
    facts: Mapping, scheme: Scheme, seed: int = 0, solver: str | None = None
) -> ModelShape:
    """What a transform may know of a model before its weights are loaded, from the facts of its
    config.json.
    """
    heads = facts["num_attention_heads"]
    family = family_of(facts.get("model_type"))
    return ModelShape(
        widths=family.widths(facts),
        layers=facts["num_hidden_layers"],
        heads=heads,
        kv_heads=facts.get("num_key_value_heads") or heads,
        head_dim=head_dim(facts),
        scheme=scheme,
        seed=seed,
        solver=solver,
        readers={site.name: site.linears for site in family.sites},
    )


_LLAMA = Family(
    "llama",
    branches=(
        Branch(
            "self_attn",
            entry=Site(
                "attn_in",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "hidden",
                norm="input_layernorm",
            ),
            exit=Site("o_in", ("self_attn.o_proj",), "heads", fed_by=("self_attn.v_proj",)),
            context=True,
        ),
        Branch(
            "mlp",
            entry=Site(
                "mlp_in",
                ("mlp.gate_proj", "mlp.up_proj"),
                "hidden",
                norm="post_attention_layernorm",
            ),
            exit=Site("down_in", ("mlp.down_proj",), "intermediate", fed_by=("mlp.up_proj",)),
        ),
    ),
)
FAMILIES = {
    family.name: family
    for family in (
        _LLAMA,
        replace(_LLAMA, name="mistral"),
        replace(_LLAMA, name="qwen2"),
        replace(_LLAMA, name="qwen3"),
    )
}


def family_of(kind: str | None) -> Family:
    """The family of a `model_type`.

    Raises ConfigError with the known ones when the architecture is not declared.
    """
    if kind not in FAMILIES:
        raise ConfigError(
            f"model: architecture '{kind}' is not declared.{nearest(kind, FAMILIES)} Known: "
            f"{', '.join(FAMILIES)}. "
            "A new one is a Family in harness/models/adapter.py."
        )
    return FAMILIES[kind]


class Adapter:
    """A loaded model seen through its family: blocks, branches, sites and the linears at them."""

    def __init__(self, model, offloaded=None):
        """offloaded: where the blocks are while they are not in use (models/offload.py).

        None: all are in memory.
        """
        self.model = model
        self.offloaded = offloaded
        self.family = family_of(model.config.model_type)
        self.roles = self.family.roles(model.config.to_dict())

    @property
    def blocks(self):
        """The decoder blocks, in order."""
        return self.model.get_submodule(self.family.blocks)

    @property
    def device(self):
        """Where the model is."""
        return self.model.get_submodule(self.family.embedding).weight.device

    @property
    def backbone(self):
        """The model without its head: tokens [B, L] -> hidden states [B, L, hidden]."""
        return self.model.get_submodule(self.family.blocks.rpartition(".")[0])

    @property
    def head(self):
        """The output projection: hidden states -> logits."""
        return self.model.get_submodule(self.family.head)

    def open(self, layer: int | None, write: bool = False) -> AbstractContextManager:
        """Within it the weights of block `layer` are in memory; write: changes to them last.

        None is outside the blocks.
        """
        if self.offloaded is None or layer is None:
            return nullcontext()
        return self.offloaded.open(layer, write)

    def name(self, index: int, linear: str) -> str:
        """The absolute name of a block-relative module."""
        return f"{self.family.blocks}.{index}.{linear}"

    def linears(self, index: int, site: Site) -> dict:
        """Block-relative name -> module for the linears that read `site` in block `index`."""
        block = self.blocks[index]
        return {name: block.get_submodule(name) for name in site.linears}

    def width(self, site: Site, index: int = 0) -> int:
        """Features of the site's activation, from the module that reads it (never from
        hidden_size).
        """
        return self.blocks[index].get_submodule(site.linears[0]).in_features
