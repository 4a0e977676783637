# Two commands for a newcomer: `make demo` and `make test`. Both make `.venv` when it is missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test lint types clean

demo: $(STAMP)
	$(VENV)/bin/python -m onnx_spdy.tools.demo

test: $(STAMP) lint types
	$(VENV)/bin/python -m pytest -q

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
$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt torch
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[demo,test]'
	touch $@

clean:
	rm -rf $(VENV) .typecheck build *.egg-info
