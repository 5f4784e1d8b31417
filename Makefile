# Two commands, each enough by itself on a machine with Python 3.11, make and PyPI: `make test` and `make demo`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
MATRIX_BIN := .venv-tf457/bin
LAVIS := salesforce-lavis==1.0.2
# The one package that the second environment replaces, and the two whose versions it pins.
OLD_TRANSFORMERS := "transformers==4.57.6" "tokenizers>=0.22,<=0.23.0" "huggingface_hub>=0.34,<1.0"
# Tests that must pass on both versions of transformers.
MATRIX_TESTS ?= $(wildcard $(addprefix tests/test_,plugin.py shims.py lavis_models.py backbone*.py lstp*.py \
	temporal_sampler.py frame_selector.py pseudo_span.py weights.py convert.py export.py prompts.py tiny_checkpoints.py \
	golden*.py published*.py lora.py lavis_backbone.py judge_local.py model_types.py \
	multiple_choice.py evaluations.py ablate.py))
export OMP_NUM_THREADS ?= 2

.PHONY: help venv lint test test-slow test-matrix chaos demo clean
help:
	@echo "make demo | test | test-slow | test-matrix | chaos | lint | venv | clean"

venv: .venv/installed
.venv/installed: setup.py
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or newer with venv found; install python3.11, or: make PYTHON=path"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[test]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(LAVIS)
	touch $@

# Everything but transformers comes from the first environment, by a .pth line that also runs the .pth lines there.
.venv-tf457/installed: .venv/installed Makefile
	test -x $(MATRIX_BIN)/python || $(PYTHON) -m venv .venv-tf457
	$(MATRIX_BIN)/python -m pip install --disable-pip-version-check --no-deps $(OLD_TRANSFORMERS)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> "$$($(MATRIX_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	$(MATRIX_BIN)/python -c 'import transformers; assert transformers.__version__ == "4.57.6", transformers.__version__'
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: venv
	$(BIN)/python -m pytest -m slow

test-matrix: venv .venv-tf457/installed
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(MATRIX_TESTS)
	$(MATRIX_BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(MATRIX_TESTS)

# Kills every command that writes before its file operations, restarts and compares; see docs/reliability.md.
chaos: venv
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py

demo: venv
	$(BIN)/lavis-lstp demo

clean:
	rm -rf .venv .venv-tf457 build dist output *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
