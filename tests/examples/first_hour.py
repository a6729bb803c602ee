"""From a question to a served model, cell by cell: quantize, compare, export, serve.

    python first_hour.py    # in a folder of its own, for it writes runs/ and exports/

A random model of two blocks and a short text stand for yours, say ["model=hf",
"model.path=Qwen/Qwen3-0.6B", "data=wikitext2"].
"""

# %% What is asked: the words of a command line
from transformers import AutoModelForCausalLM, AutoTokenizer

import harness
from harness.command.main import main

MODEL = ["model=tiny", "tracking=local"]
TEXT = [
    "data.calibration.windows=8",
    "data.calibration.length=64",
    "eval.perplexity.windows=4",
    "eval.perplexity.length=128",
]

# %% Quantize: NVFP4 weights and activations, to nearest and with what is known of the text
nearest = harness.run(*MODEL, *TEXT, "format=nvfp4", "solver=rtn")
solved = harness.run(*MODEL, *TEXT, "format=nvfp4", "transform=hadamard", "solver=gptq")

# %% Compare: all runs in a table, then two of them, window by window
main(["report", "ls", "runs", "--sort", "ppl"])
main(["report", "diff", "runs", nearest.run.path.name, solved.run.path.name])

# %% Export: the blocks that are solved already, written, loaded back and compared
exported = harness.run(
    *MODEL,
    *TEXT,
    "format=nvfp4",
    "transform=hadamard",
    "solver=gptq",
    "export=harness",
    "export.path=exports",
)
folder = exported.metrics["export"]["path"]

# %% Serve: in transformers, which `import harness` has taught the layout
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("A decoder reads", return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
print(tokenizer.decode(answer[0]))
# In vLLM: make vllm, then .venv-vllm/bin/vllm serve FOLDER --enforce-eager
