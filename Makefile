# Two commands for a newcomer: `make demo` and `make test`. Both make `.venv` when it is missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
STAMP := $(VENV)/.installed

# The sparse engine, compiled by the ziglang package when it is built.
SPARSE_SOURCES := $(wildcard runtimes/sparse/native/* runtimes/sparse/*/*.py) runtimes/sparse/setup.py \
	runtimes/sparse/pyproject.toml

OLDEST_PYTHON ?= $(or $(wildcard $(shell pyenv prefix 3.10 2>/dev/null)/bin/python3.10),python3.10)
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed

# Of the sparse engine, compiled by the system's GCC.
SANITIZED := .sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1

.PHONY: demo test test-oldest test-sanitizers test-neon lint types clean

demo: $(STAMP)
	$(VENV)/bin/python -m onnx_spdy.tools.demo

# Two processes, each with whole files, in the order in which they are collected: see tests/conftest.py.
test: $(STAMP) lint types
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# The tests with the oldest versions that pyproject.toml allows. Makes an environment of its own and, on x86-64, gets
# about 3 GB for it: that torch is there for CUDA only, with NVIDIA's libraries. Old packages warn, so warnings pass;
# torch 2.9 imports setuptools.
test-oldest: $(OLDEST_STAMP)
	$(OLDEST)/bin/python -m pytest -q -o filterwarnings=

# Random graphs in the sparse engine under GCC's sanitizers: of addresses and of undefined behaviour.
test-sanitizers: $(STAMP)
	CXX=g++ CXXFLAGS="$(SANITIZERS)" $(VENV)/bin/pip install -q --upgrade --no-deps --no-build-isolation \
		--target $(SANITIZED) ./runtimes/sparse
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) OMP_NUM_THREADS=1 \
		$(VENV)/bin/python tests/runtimes/sparse/random_graphs.py 300

# The sparse engine's NEON kernels, compiled for aarch64 and run by an emulator.
test-neon: $(STAMP)
	$(VENV)/bin/pip install -q ziglang unicorn pyelftools
	$(VENV)/bin/python tests/runtimes/sparse/neon.py 2000

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy can't follow setuptools' package-dir, so it reads the folders through symlinks.
types: $(STAMP)
	mkdir -p .typecheck/onnx_spdy
	for folder in models pipeline runtimes tools; do ln -sfn ../../$$folder .typecheck/onnx_spdy/$$folder; done
	MYPYPATH=.typecheck $(VENV)/bin/mypy --namespace-packages --explicit-package-bases \
		-p onnx_spdy.models -p onnx_spdy.pipeline -p onnx_spdy.runtimes -p onnx_spdy.tools

# torch comes first and from the constraints file: a looser requirement would pull the CUDA build.
$(STAMP): pyproject.toml constraints.txt $(SPARSE_SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt torch
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[demo,test]'
	$(VENV)/bin/pip install -q --force-reinstall --no-deps ./runtimes/sparse
	touch $@

# uv, in the version of constraints.txt, finds the interpreter by its name or version, or gets it.
$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt $(STAMP)
	test -x $(OLDEST)/bin/python || $(VENV)/bin/uv venv -q --python $(OLDEST_PYTHON) $(OLDEST)
	$(VENV)/bin/uv pip install -q --python $(OLDEST) -c constraints-oldest.txt -e . distributed openvino scikit-learn \
		hypothesis pytest pytest-cov 'setuptools<81'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(SANITIZED) .typecheck build *.egg-info
