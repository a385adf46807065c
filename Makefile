# `make train` and `make test` do all set-up themselves: a virtual environment with the tested versions in .venv.
# Variables: PYTHON (the interpreter to start from), VENV (where to put the environment), and ARGS, which go to the
# training script or to pytest: make train ARGS="--steps 100", make test ARGS="-k mask".

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Results of each GPU have a folder of their own, named by the model: h200 of "NVIDIA H200".
GPU = $(shell nvidia-smi --query-gpu=name --format=csv,noheader | awk 'NR == 1 {print tolower($$2)}')
RESULTS ?= benchmarks/results/$(or $(GPU),$(error no GPU found: set RESULTS to the folder of the results))

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPES := build/types/sparse24

# Modules are compiled when they are first imported, not all of them at installation, which would take a minute more. Where
# this variable is set, each process would compile them anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test test-gpu sanitize bench lint docs clean
.DELETE_ON_ERROR:
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# PASSIVE: on a CPU that other programs use too, OpenMP's waiting threads would take the cores from its working ones.
train: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/train_gpt.py $(ARGS)

# Two workers of one thread each: more threads than cores make torch's small CPU kernels many times slower. -rs: what was
# skipped, and why, stands at the end. loadgroup: what shares launches of several processes stays on one worker.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadgroup -rs $(ARGS)

# On a machine with a GPU, in the environment that is active there. Each test is named in the log as soon as it ends.
test-gpu:
	mkdir -p benchmarks/results
	OMP_NUM_THREADS=1 python -m pytest -v -n $${WORKERS:-8} --dist loadgroup --durations=10 --tb=short -W ignore tests/gpu $(ARGS) 2>&1 | sed -u -E 's#$(CURDIR)#.#; s# -- /.*/# -- #' | tee benchmarks/results/gpu_tests.log

# NVIDIA's compute-sanitizer over the Triton kernels and cuSPARSELt: out-of-bounds and misaligned accesses. Minutes.
sanitize:
	mkdir -p benchmarks/results
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all --error-exitcode 9 python -m pytest -q -W ignore tests/gpu/test_kernels.py -k "bytes_of_the_twin or to_rounding or every_provider or behind or decay" $(ARGS) 2>&1 | tee benchmarks/results/sanitizer.log

# Every number of README and docs anew, on the GPU at hand: over an hour. ARGS=--resume goes on after a run that was cut.
bench:
	$(if $(ARGS),,rm -f $(RESULTS)/step*.json $(RESULTS)/models*.json)
	python benchmarks/step.py --layers ffn all --profile --models llama3-8b-width llama-1b-width --out $(RESULTS)/step_llama.json $(ARGS)
	python benchmarks/step.py --layers ffn --models gpt2-xl-width gpt2-large-width gpt2-medium-width gpt2-small vit-l bert-base --out $(RESULTS)/step_others.json $(ARGS)
	python benchmarks/step.py --layers ffn --cudagraphs --models gpt2-small vit-l bert-base --out $(RESULTS)/graph_steps.json $(ARGS)
	for script in gemm ffn models; do python benchmarks/$$script.py --out $(RESULTS)/$$script.json $(ARGS); done
	for script in pack memory compile_time inference; do python benchmarks/$$script.py --out $(RESULTS)/$$script.json; done
	python benchmarks/tables.py

# mypy reads a copy of the packages laid out as they are installed; its messages name the true files.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPES) && mkdir -p $(TYPES)
	cp -Rp sparse24/. compiler passes kernels $(TYPES)
	$(BIN)/mypy $(TYPES) examples | sed -E 's#^build/types/(sparse24/(compiler|passes|kernels))?#\2#'

# The site, in build/site; a link to nowhere is an error. The variable silences the theme's notice of its end of life.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(STAMP): pyproject.toml constraints.txt tests/models/timm.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e ".[train,test,dev,docs]"
	$(BIN)/python -m pip install --no-compile --no-deps -r tests/models/timm.txt
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
