# Every target works as the first command on a fresh machine with Python 3.11 to 3.13: it makes .venv and installs what it needs.
PYTHON ?= python3
BIN = .venv/bin
TORCH = $(shell grep '^torch==' constraints.txt)
PIP_INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
export PYTHONSAFEPATH = 1
# Threads that wait sleep. On an idle machine spinning is a third faster; beside one busy process it is several times slower.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: setup smoke tiny-v4 browser slurm test test-all check docs figures bench soak gpu clean

# torch comes first and pinned: asked for by range, pip may take a build of several GB for another kind of machine.
.venv/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "openv4 needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv \
		|| { echo "cannot make .venv; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "installing openv4 into .venv (about two minutes) ..."
	@$(PIP_INSTALL) $(TORCH)
	@$(PIP_INSTALL) -e .
	@touch $@

.venv/.dev: .venv/.runtime
	@echo "installing the test tools ..."
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@

.venv/.docs: .venv/.runtime
	@echo "installing mkdocs ..."
	@$(PIP_INSTALL) -e '.[docs]'
	@touch $@

setup: .venv/.dev

smoke: .venv/.runtime
	$(BIN)/openv4 train run=smoke

# A model of a million parameters in the format of the released instruct models, to try fine-tuning on: pretrained, taught
# to answer, quantised. About four minutes.
tiny-v4: runs/tiny_v4

runs/tiny_v4: | .venv/.runtime
	$(BIN)/openv4 train run=smoke model=nano output=runs/tiny_v4_pretrained
	$(BIN)/openv4 export checkpoint=runs/tiny_v4_pretrained output=runs/tiny_v4_base format=fp32
	$(BIN)/openv4 train run=finetune model.pretrained=runs/tiny_v4_base data.path=data/corpus/conversations.jsonl.gz \
		precision=fp32 recompute=none stages.0.sequence_length=1024 stages.0.batch_tokens=2048 stages.0.lr=5e-3 epochs=6 \
		output=runs/tiny_v4_chat
	$(BIN)/openv4 export checkpoint=runs/tiny_v4_chat output=$@ format=fp4+fp8

# The tests of the report open it in Chromium, which is no Python package.
BROWSER = apt-get install -y --no-install-recommends chromium chromium-driver
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
		echo "no chromium and chromedriver on PATH: the tests of the report need both; install them"; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update -qq && $(BROWSER); \
	elif sudo -n true 2>/dev/null; then sudo apt-get update -qq && sudo $(BROWSER); \
	else echo "no chromium and chromedriver on PATH: the tests of the report need both; sudo $(BROWSER)"; \
	fi

# The tests of the batch script run it under a SLURM of their own; Debian's packages bring its programs.
SLURM = apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
slurm:
	@if PATH="$$PATH:/usr/sbin" command -v slurmctld >/dev/null && command -v sbatch >/dev/null; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
		echo "no slurmctld here: the tests of SLURM jobs are skipped; install slurmctld, slurmd, its commands and munge"; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update -qq && $(SLURM); \
	elif sudo -n true 2>/dev/null; then sudo apt-get update -qq && sudo $(SLURM); \
	else echo "no slurmctld here: the tests of SLURM jobs are skipped; sudo $(SLURM)"; \
	fi

# Many small tests: a process a core with one thread each is twice as fast as one process with a thread a core. Those
# that start processes themselves, for all tests of a file, stay together (xdist_group).
test: .venv/.dev browser slurm
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadgroup -m "not slow and not gpu"

# Two at a time, whatever the machine: most of them wait for processes of their own.
test-all: test
	$(BIN)/pytest -n 2 --dist loadgroup -m "slow and not gpu"

# mypy and pyright see the repository under its import name through .ns/openv4 -> ..
check: .venv/.dev
	@mkdir -p .ns && ln -sfn .. .ns/openv4
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_imports.py

# The pages of docs/ and the API from the docstrings, in build/site; a broken link or reference is an error. The API is
# read, not imported, through build/api/openv4: the repository itself would be read with all that lies in it.
docs: .venv/.docs
	@mkdir -p build/api/openv4
	@for part in __init__.py kernels data model optim train launch; do ln -sfn ../../../$$part build/api/openv4/$$part; done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Figures of the documentation that are calculated, not taken from runs.
figures: .venv/.dev
	$(BIN)/python docs/figures/flow.py
	$(BIN)/python docs/figures/mhc_gain.py

# Time and memory beside transformers and torch, written to docs/results/: about half an hour on an idle machine with 20 GB
# free. There, threads may spin a moment before they sleep, the default: a fairer and faster setting for both sides.
bench: .venv/.dev
	env -u OMP_WAIT_POLICY $(BIN)/pytest tests/test_benchmark.py --bench -s

# Runs killed so many times at random moments and resumed, to docs/results/soak.md and .json: 20 minutes for 1,000.
KILLS ?= 1000
soak: .venv/.dev
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/tests $(BIN)/python tests/soak.py --kills $(KILLS)

# On a machine with a CUDA device, and perhaps nothing else: the tests of the kernels, then the benchmarks, in groups of
# less than ten minutes, to docs/results/ or the folder OPENV4_GPU_RESULTS. Nothing is installed; what is missing is
# skipped and named. `make gpu GROUP=mhc`, or several: GROUP=correctness,mhc.
GROUP ?= all
GPU_PYTHON ?= $(shell $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
	&& echo $(BIN)/python || echo $(PYTHON))
gpu:
	@$(GPU_PYTHON) -c 'import torch' || { echo "$(GPU_PYTHON) has no torch; set GPU_PYTHON=..."; exit 1; }
	@mkdir -p .ns && ln -sfn .. .ns/openv4
	PYTHONPATH=$(CURDIR)/.ns:$(CURDIR)/tests $(GPU_PYTHON) tests/gpu_run.py $(GROUP)

clean:
	rm -rf .venv .ns build *.egg-info .mypy_cache .ruff_cache .pytest_cache
