"""A model that nobody has seen: attention and MLP read one norm, and queries, keys and values come
out of one matrix."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class Wrapped(nn.Module):
    """No norm of any library, by F.normalize: sqrt(n) x / |x| times 1 + w."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * (1 + self.weight)


class UnseenConfig(PreTrainedConfig):
    model_type = "unseen_parallel"

    def __init__(self, hidden_size=64, layers=3, heads=4, groups=2, vocab_size=258, **fields):
        self.hidden_size = hidden_size
        self.layers = layers
        self.heads = heads
        self.groups = groups
        self.vocab_size = vocab_size
        super().__init__(**fields)


class UnseenBlock(nn.Module):
    def __init__(self, config: UnseenConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.heads
        self.groups = config.groups
        self.size = width // config.heads
        self.before = Wrapped(width)
        self.fused = nn.Linear(width, (config.heads + 2 * config.groups) * self.size)
        self.back = nn.Linear(width, width)
        self.wide = nn.Linear(width, 4 * width)
        self.gate = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, hidden):
        x = self.before(hidden)
        heads = self.fused(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.groups, self.groups], dim=1)
        repeat = self.heads // self.groups
        k = k.repeat_interleave(repeat, dim=1)
        v = v.repeat_interleave(repeat, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mlp = self.narrow(self.wide(x) * torch.tanh(self.gate(x)))
        return hidden + self.back(mixed.transpose(1, 2).flatten(-2)) + mlp


class UnseenModel(PreTrainedModel):
    config_class = UnseenConfig
    base_model_prefix = "body"

    def __init__(self, config: UnseenConfig):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList(UnseenBlock(config) for _ in range(config.layers))
        self.after = Wrapped(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, use_cache=False, **_):
        hidden = self.table(input_ids)
        for block in self.stack:
            hidden = block(hidden)
        return BaseModelOutputWithPast(last_hidden_state=self.after(hidden))


class UnseenForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = UnseenConfig
    base_model_prefix = "body"

    def __init__(self, config: UnseenConfig):
        super().__init__(config)
        self.body = UnseenModel(config)
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.body.table

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, **arguments):
        hidden = self.body(input_ids, **arguments).last_hidden_state
        return CausalLMOutputWithPast(logits=self.out(hidden))
