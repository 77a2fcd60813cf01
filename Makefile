# `make train` and `make test` do all the set-up they need; a second run repeats nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA GPU the CPU build of PyTorch is enough; its index is PyTorch's own.
CPU_TORCH := torch==2.13.0+cpu
CPU_INDEX := https://download.pytorch.org/whl/cpu
# For the GPU rehearsal: an interpreter, and where its environment is (one that exists is taken as it is).
PYTHON312 ?= $(shell for python in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python; do \
  $$python -c "" 2>/dev/null && echo $$python && break; done)
GPU_VENV ?= .venv-gpu
TOOLS := build/tools
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.PHONY: train demo screenshots test test-long chaos resume-matrix fuzz long-run package-audit lock check docs dist setup assets \
  benchmark gpu-rehearsal convert-benchmark alignment-check fading compare held-out-naming report clean

# --fused on a CPU too: adapters without intermediate sums make a step shorter there as well.
train: assets
	$(BIN)/python -m pointalign.train $(ARGS) --fused

demo: assets
	$(BIN)/python -m pointalign.demo $(ARGS)

# Pictures of the page for the README, by Chromium.
screenshots: assets
	$(BIN)/python docs/images/page.py

# The modules of this checkout are compiled once, not by every process of the tests.
test: export PYTHONDONTWRITEBYTECODE :=
test: setup
	$(BIN)/python -m pytest tests -rs -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: assets
	POINTALIGN_LONG_TESTS=1 POINTALIGN_FUZZ_CASES=5000 $(BIN)/python -m pytest tests/test_build.py tests/test_native.py \
	  tests/test_damaged_files.py tests/test_resume_demo.py tests/test_attach_training.py \
	  tests/test_benchmarks.py tests/test_interruptions.py tests/test_code_blocks.py \
	  tests/test_notebook.py tests/test_wheel.py tests/test_indexed_conversations.py \
	  tests/test_alignment_interpreted.py tests/test_fused_training.py -rs -q

chaos: setup
	$(BIN)/python benchmarks/chaos.py $(ARGS)

resume-matrix: setup
	$(BIN)/python benchmarks/resume_matrix.py $(ARGS)

fuzz: setup
	$(BIN)/python benchmarks/fuzz.py $(ARGS)

long-run: setup
	$(BIN)/python benchmarks/long_run.py $(ARGS)

# Write the hashes of every package's files, as PyPI has them, to requirements-hashed.txt.
lock: $(TOOLS)/bin/uv
	{ sed -n '/^#/p;/^[^#]/q' requirements-hashed.txt; \
	  $(TOOLS)/bin/uv pip compile pyproject.toml --extra dev --extra eval --extra docs --extra cuda -c constraints.txt \
	    --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -q; } > requirements-hashed.new
	mv requirements-hashed.new requirements-hashed.txt

# Asks the database of known weaknesses about every package there; without an answer this fails, and proves nothing.
package-audit: $(TOOLS)/bin/uv
	$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes -r requirements-hashed.txt || { \
	  echo "package-audit: weaknesses are named above, or packages that the database could not be asked about"; exit 1; }

$(TOOLS)/bin/uv:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install -q uv pip-audit

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The pages of docs/ as a site that opens from the disk, build/site/index.html; a broken link fails.
docs: setup
	$(BIN)/python docs/generate_options.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# A source archive, and a wheel with the point operations compiled for the CPU; CUDA is compiled from the archive.
dist: setup
	rm -rf dist
	POINTALIGN_BUILD=cpu $(BIN)/python -m build --no-isolation --outdir dist

convert-benchmark: setup
	$(BIN)/python benchmarks/convert_full_size.py

benchmark: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only --results benchmarks/results $(ARGS)

gpu-rehearsal:
	benchmarks/gpu_rehearsal.sh "$(PYTHON312)" $(GPU_VENV)

alignment-check: assets
	$(BIN)/python -m experiments.alignment_check $(ARGS)

# Gate, grid and report; an interrupted grid continues. Several of these at once share the cells among them.
fading: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.fading $(ARGS)

compare: assets
	$(BIN)/python -m experiments.compare $(ARGS)

held-out-naming: assets
	$(BIN)/python -m experiments.held_out_naming $(ARGS)

report: setup
	$(BIN)/python benchmarks/report.py

setup: $(VENV)/.complete

assets: setup
	$(BIN)/python -m pointalign.assets

$(VENV)/.complete: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel ninja
	if command -v nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/pip install -q -c constraints.txt torch; \
	else \
	  $(BIN)/pip install -q "$(CPU_TORCH)" || $(BIN)/pip install -q "$(CPU_TORCH)" --index-url $(CPU_INDEX); \
	fi
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e ".[dev,eval,docs]"
	touch $@

clean:
	rm -rf $(VENV) .venv-gpu build dist *.egg-info
