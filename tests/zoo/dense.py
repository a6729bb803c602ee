"""Dense decoders of today: those that differ from Llama in little, and others."""

from zoo.fields import GRANITE, LATENT, WINDOWED, base

LLAMA_LIKE = {
    "llama": ("llama", base()),
    "internlm3": ("internlm3", base()),
    "mistral": ("mistral", base(sliding_window=64)),
    "ministral": ("ministral", base(sliding_window=64)),
    "ministral3": ("ministral3", base()),
    "seed_oss": ("seed_oss", base()),
    "helium": ("helium", base()),
    # No gate: two matrices in an MLP.
    "arcee": ("arcee", base()),
    # The difference of two attentions.
    "diffllama": ("diffllama", base()),
    "doge": ("doge", base("head_dim")),
    # Its rotary embedding stretches from 8192 positions, so it needs more than those.
    "cwm": ("cwm", base(**WINDOWED, max_position_embeddings=16384)),
    "ernie4_5": ("ernie4_5", base()),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", base()),
    "exaone4": ("exaone4", base(**WINDOWED)),
    # Every fourth layer has no rotary embedding.
    "smollm3": ("smollm3", base("head_dim", num_hidden_layers=4)),
    "apertus": ("apertus", base("head_dim")),
    "nanochat": ("nanochat", base("head_dim")),
    "bitnet": ("bitnet", base("head_dim")),
    "nemotron": ("nemotron", base()),
    "granite": ("granite", base("head_dim", **GRANITE)),
    "minicpm3": ("minicpm3", base("head_dim", **LATENT)),
    "youtu": ("youtu", base("head_dim", **LATENT)),
}

OTHER_DENSE = {
    "phi": ("phi", base("head_dim", partial_rotary_factor=0.5)),
    # One matrix for queries, keys and values, one for gate and up.
    "phi3": ("phi3", base("head_dim")),
    "olmo": ("olmo", base("head_dim")),
    "olmo2": ("olmo2", base("head_dim")),
    "olmo3": ("olmo3", base("head_dim", **WINDOWED)),
    "stablelm": ("stablelm", base("head_dim", partial_rotary_factor=0.25)),
    "cohere": ("cohere", base("head_dim")),
    "cohere2": ("cohere2", base(**WINDOWED)),
    "glm": ("glm", base()),
    "glm4": ("glm4", base()),
    "starcoder2": ("starcoder2", base("head_dim")),
    "persimmon": ("persimmon", base("head_dim", "num_key_value_heads")),
}
