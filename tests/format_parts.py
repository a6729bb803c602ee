"""The parts of a format section, and what stands in each."""

from harness.formats import Format, KVCache

PARTS = {"weight": Format, "act": Format, "kv": KVCache}
