"""Next-token losses of windows of tokens in vLLM: python vllm_losses.py REQUEST ANSWER.

    REQUEST  {"folder", "dtype", "windows": {corpus: [[token id, ..], ..]}}
    ANSWER   {corpus: [summed loss of a window in nats, ..]}, "vllm": its version

both JSON files. Run by the python of an environment that has vLLM, as a file, for it needs nothing
of this project there: what is loaded may be a layout that vLLM knows itself. One window is one
forward, starting afresh, and its log-probabilities are those of every token of the prompt.
"""

import json
import os
import sys
from pathlib import Path

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def main(request: Path, answer: Path) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm  # pyright: ignore[reportMissingImports]

    asked = json.loads(request.read_text())
    longest = max(len(window) for windows in asked["windows"].values() for window in windows)
    model = vllm.LLM(
        asked["folder"],
        dtype=asked["dtype"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=longest + 1,
        max_num_batched_tokens=longest + 1,
        max_num_seqs=1,
        enable_prefix_caching=False,
    )
    sampling = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = {}
    for corpus, windows in asked["windows"].items():
        prompts = [{"prompt_token_ids": window} for window in windows]
        outputs = model.generate(prompts, sampling, use_tqdm=False)
        found[corpus] = [
            _loss(output.prompt_token_ids, output.prompt_logprobs) for output in outputs
        ]
    answer.write_text(json.dumps({"vllm": vllm.__version__, "losses": found}))


def _loss(tokens, logprobs) -> float:
    """The first token is never a target, and has no probability."""
    return -sum(logprobs[t][tokens[t]].logprob for t in range(1, len(tokens)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
