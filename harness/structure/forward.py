"""One forward of a few tokens, recorded: what a structure is derived from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from harness.libraries.transformers import watched_attention
from harness.structure.composite import decoder_of
from harness.structure.norms import NormKind, norm_kind
from harness.structure.tape import Tape, Value, tensors_of

TOKENS = 12  # no width of a model


class Forward:
    """A model's forward of TOKENS tokens, norms recorded as one call each.

    tape: its calls. names: {id of a parameter: its absolute name}. kinds: {id of a module: the norm
    it is}. returned: how many results a block returns in a tuple; 0: hidden states alone.
    attending: absolute names of the modules that find their attention by transformers' name for it;
    otherwise: the blocks that compute something else when it has another name. arriving: the shape
    of the hidden states that blocks take; handed: those that each block hands on. passed: the
    blocks that a text alone passes.
    """

    def __init__(self, model, blocks: str):
        """model: transformers' causal language model; blocks: the name of its list of blocks."""
        self.model = model
        self.blocks = blocks
        self.names: dict[int, str] = {}
        self.kinds: dict[int, NormKind] = {}
        self.returned = 0
        self.attending: set[str] = set()
        self.otherwise: set[int | None] = set()
        self.arriving: tuple[int, ...] = ()
        self.handed: list[Value] = []
        self.passed: set[int] = set()
        for name, tensor in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(tensor), name)
        self._tried: dict[tuple, NormKind | None] = {}
        self.tape = self._recorded()

    def _recorded(self) -> Tape:
        """A tape of a forward of TOKENS tokens."""
        device = self.model.get_input_embeddings().weight.device
        ids = (torch.arange(TOKENS, device=device) % 7 + 3).unsqueeze(0)
        if not ids.is_meta:
            return self._record(ids, {})
        # masks that are made on the way read the tokens, which are not there; models differ in
        # what they take instead
        size = (1, 1, TOKENS, TOKENS)
        mask = torch.zeros(size, device="meta", dtype=self.model.dtype)
        for given in (mask, None, torch.ones_like(ids)):
            try:
                return self._record(ids, {"attention_mask": given})
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as refused:
                error = refused
        raise error

    def _record(self, ids: Tensor, arguments: dict) -> Tape:
        """A tape of token ids [1, TOKENS]; who attends is seen by another run."""
        with watched_attention(decoder_of(self.model)) as called:
            watched = _lines(self._run(ids, arguments))
        modules = {id(module): name for name, module in self.model.named_modules()}
        self.attending = {modules[id(module)] for module in called}
        tape = self._run(ids, arguments)
        lines = _lines(tape)
        self.otherwise = {layer for layer, line in lines.items() if line != watched.get(layer)}
        return tape

    def _run(self, ids: Tensor, arguments: dict) -> Tape:
        """A tape of one forward."""
        tape = Tape([ids], self.names)
        self.handed = []

        def is_norm(module: nn.Module, args: tuple) -> bool:
            if not args or not isinstance(args[0], Tensor) or not args[0].shape:
                return False
            key = (type(module), args[0].shape[-1], *(p.shape for p in module.parameters()))
            if key not in self._tried:
                self._tried[key] = norm_kind(module, args[0].shape[-1])
            kind = self._tried[key]
            if kind is not None:
                self.kinds[id(module)] = kind
            return kind is not None

        with ExitStack() as hooks:
            for layer, block in enumerate(self.model.get_submodule(self.blocks)):
                hooks.enter_context(self._within(tape, block, layer))
            for module in self.model.modules():
                if not list(module.children()):
                    hooks.enter_context(tape.leaf(module, is_norm))
            with torch.no_grad(), tape:
                output = self.model(input_ids=ids, use_cache=False, **arguments)
        tape.finish(output.logits)
        return tape

    @contextmanager
    def _within(self, tape: Tape, block: nn.Module, layer: int) -> Iterator[None]:
        """Within it, what a block calls is recorded as its own."""

        def enter(_, args: tuple, kwargs: dict) -> None:
            tape.layer = layer
            self.passed.add(layer)
            self.arriving = tuple(tensors_of((args, kwargs))[0].shape)

        def leave(_, args: tuple, result: object) -> None:
            tape.layer = None
            self.returned = len(result) if isinstance(result, tuple) else 0
            self.handed.append(tape.value(tensors_of(result)[0]))

        with ExitStack() as hooks:
            hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
            yield


def _lines(tape: Tape) -> dict[int | None, list[str]]:
    """What each block calls, in order."""
    lines: dict[int | None, list[str]] = defaultdict(list)
    for call in tape.calls:
        lines[call.layer].append(call.op)
    return lines
