# `make test` is all a fresh machine needs: it makes the environment, installs and checks everything.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(abspath $(VENV))/bin
READY  := $(VENV)/.ready
ROOT   := $(abspath .)

.PHONY: test lint types unit trt gpu demo docs coverage interop extras compare quality bench format clean

test: lint types unit

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy wants the package under an importable name; the checkout may lie in a folder of any name.
types: $(READY)
	mkdir -p .cache/types && ln -sfn $(ROOT) .cache/types/llmc
	cd .cache/types && $(BIN)/mypy --config-file $(ROOT)/pyproject.toml --cache-dir $(ROOT)/.mypy_cache -p llmc

# One thread a process: there is a process for each core, and threads that share one wait for each other.
unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist worksteal --durations=10

# TensorRT's engines of ten families, five of them in all precisions, without a GPU: gate, build, record and network.
trt: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -rP -n auto --dist worksteal tests/trt

# On a machine with an NVIDIA GPU: what `make unit` can only skip. Prints times beside torch's; asserts none.
gpu: $(READY)
	$(BIN)/pytest -q -rs -s tests/gpu

# Compiles a real model, holds it against transformers, and asks it something.
DEMO := .cache/demo
demo: $(READY)
	@mkdir -p $(dir $(DEMO))
	$(BIN)/llmc compile demo --int8 --output $(DEMO)
	$(BIN)/llmc run $(DEMO) "Write two sentences about the sea."

# What is generated in the docs: the table of rooms and the page of error codes.
docs: $(READY)
	$(BIN)/python tests/rooms.py
	$(BIN)/python -m llmc.error_codes --write docs/errors.md

# Every model type of transformers, not only the third that `make test` takes; rewrites docs/coverage.md.
coverage: $(READY)
	$(BIN)/python tests/model_coverage.py --write docs/coverage.md

# The same folders in other runtimes, each in an environment of its own.
interop: $(READY)
	$(BIN)/python tests/interop/run.py

# Every verb in a fresh environment with each extra; downloads torch and needs the package index.
extras: $(READY)
	$(BIN)/python tests/extras.py

# Beside onnxruntime-genai, llama.cpp and OpenVINO in one run, each in an environment of its own: single sequences, then
# many requests at once; takes two hours.
compare: $(READY)
	$(BIN)/python examples/compare/compare.py --cache .cache/compare --model demo --model llama-1b --write docs/performance.md
	$(BIN)/python examples/compare/serving.py --cache .cache/compare --model demo --write docs/performance.md

# Measures the loss from quantization, of every scheme and of llama.cpp and onnxruntime-genai, against the same
# reference logits; takes two hours.
quality: $(READY)
	$(BIN)/python examples/compare/quality.py --cache .cache/compare --write docs/quantization.md --plot docs/images/kld.svg
	$(BIN)/python examples/compare/quality_twins.py --cache .cache/compare --write docs/quantization.md

# Prints how long capture and the matmuls of a step take; asserts nothing.
bench: $(READY)
	$(BIN)/python examples/bench_capture.py
	$(BIN)/python examples/bench_matmul.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache build *.egg-info
