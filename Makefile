# Two commands, each enough by itself on a machine with Python 3.11, make and PyPI: `make test` and `make demo`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
MATRIX_BIN := .venv-tf457/bin
LAVIS := salesforce-lavis==1.0.2
# The one package that the second environment replaces, and the two whose versions it pins.
OLD_TRANSFORMERS := "transformers==4.57.6" "tokenizers>=0.22,<=0.23.0" "huggingface_hub>=0.34,<1.0"
# Tests that must pass on both versions of transformers.
MATRIX_TESTS ?= $(addprefix tests/,host/test_plugin.py host/test_shims.py host/test_lavis_models.py host/test_lavis_table.py models \
	metrics/test_multiple_choice.py data/test_prompts.py judging/test_judge_local.py tasks/test_evaluations.py \
	commands/test_convert.py commands/test_export.py commands/test_ablate.py)
export OMP_NUM_THREADS ?= 2

.PHONY: help venv lint test test-slow test-matrix fuzz chaos demo demo-real docs clean
help:
	@echo "make demo | demo-real | test | test-slow | test-matrix | fuzz | chaos | docs | lint | venv | clean"

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
	$(BIN)/ruff check --preview --select PLW1514 .  # text files are opened with an encoding
	$(BIN)/ruff format --check .

# In the order of the folders: by the number of tests, as xdist likes it, the files with the longest ones came last.
test: lint
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: venv
	$(BIN)/python -m pytest -m slow

test-matrix: venv .venv-tf457/installed
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(MATRIX_TESTS)
	$(MATRIX_BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(MATRIX_TESTS)

# Looks for files that break a reader, so long with each of them; what it finds becomes a file in tests/fuzz_cases.
FUZZ_SECONDS ?= 600
fuzz: venv
	$(BIN)/python tests/fuzz.py --seconds $(FUZZ_SECONDS) $(FUZZ_TARGETS)
# Kills every command that writes before its file operations, restarts and compares; see docs/reliability.md.
chaos: venv
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py

# The pages as a site in site/; a broken link is an error.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

demo: venv
	$(BIN)/lavis-lstp demo

# Needles in a real film, make demo-real FILM=FILE; projects/lstp/chains/needles.yaml says where to get one.
demo-real: venv
	@test -f "$(FILM)" || { echo "name a film: make demo-real FILM=FILE (see docs/selection.md)"; exit 2; }
	$(BIN)/lavis-lstp demo --film "$(FILM)"

clean:
	rm -rf .venv .venv-tf457 build dist site output *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
