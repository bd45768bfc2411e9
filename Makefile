# Every target sets up .venv by itself; the first call takes a few minutes, later ones start at once.
#   make reproduce [PROFILE=smoke|cpu|study|study-25m|paper] [CLAIM=3]   run the notebooks (what one claim compares), write tables, figures
#   make reproduce ARGS="--budget 9m"              start nothing after 9 minutes; "Error 3": work is left, run again to go on
#   make reproduce ARGS="--workers tcp://host:8786"   train on the workers of a Dask scheduler
#   make compare [PROFILE=cpu]                     do the tables of a run agree with those recorded?
#   make lab [ARGS=--no-browser]                   JupyterLab, with copies of the notebooks to play with
#   make bench [ARGS=--quick]   time and memory of a training step by method, to data/results/bench and figures/bench
#   make test-long                                 kill, resume and fuzz for a quarter of an hour
#   make test-browser                              move each control of each view in JupyterLab; needs Chromium
#   make test-mutants [ARGS="--budget 30"]         change the method's room a little, again and again: do tests notice?
#   make test-versions         core tests under other Pythons, and the oldest and newest transformers that are allowed
#   make docs                                      a site of README, pages, notebooks and public names: site/html/index.html
#   make test | lint | format | setup | lock | readme (its tables, from data/results/cpu)

PROFILE ?= cpu
WORKERS ?= -n auto --maxprocesses 4
VENV := .venv
export OMP_WAIT_POLICY ?= PASSIVE
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.ready
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: reproduce compare bench test test-browser test-long test-mutants test-versions lint format readme docs lab setup lock clean
.DEFAULT_GOAL := reproduce

reproduce: $(STAMP)
	$(RUN) -m apexlib reproduce --profile "$(PROFILE)" $(addprefix --claim ,$(CLAIM)) $(ARGS)

# threads wait as they do in a run of your own
bench: $(STAMP)
	env -u OMP_WAIT_POLICY HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m benchmarks $(ARGS)

test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest $(WORKERS) --dist loadscope $(ARGS)

test-browser: $(STAMP)
	$(RUN) -m pip install --quiet --disable-pip-version-check playwright==1.61.0
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m "browser and not slow" $(ARGS) tests/test_browser.py

test-mutants: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) tests/mutants.py $(ARGS)

test-versions: $(STAMP)
	$(RUN) tests/versions.py

test-long: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -m "slow and not browser" $(WORKERS) --dist worksteal $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(STAMP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

readme: $(STAMP)
	$(RUN) tests/readme.py

docs: $(STAMP)
	$(RUN) -m sphinx --quiet --fail-on-warning --keep-going -d site/doctrees -c docs . site/html

lab: $(STAMP)
	$(RUN) -m apexlib play
	$(RUN) -m jupyter lab --LabApp.default_url=/lab/tree/play/index.ipynb $(ARGS)

compare: $(STAMP)
	$(RUN) -m apexlib compare --profile "$(PROFILE)"

setup: $(STAMP)

# requirements-cuda.lock only constrains: a CPU build of torch asks for none of it
$(STAMP): requirements.lock requirements-cuda.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "need Python 3.11 or newer; found none (name one with PYTHON=...)" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock -c requirements-cuda.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(STAMP)

# pins for every platform and Python version at once; the CUDA packages go to a file of their own
lock:
	$(PYTHON) -m venv .venv/lock
	.venv/lock/bin/python -m pip install --quiet uv
	printf 'torch==2.13.0\n' > .venv/lock/torch.txt
	.venv/lock/bin/python -m uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-header --no-annotate \
		-c .venv/lock/torch.txt pyproject.toml -o .venv/lock/all.txt
	grep -v -E '^(nvidia-|cuda-|triton)' .venv/lock/all.txt > requirements.lock
	grep -E '^(nvidia-|cuda-|triton)' .venv/lock/all.txt > requirements-cuda.lock

clean:
	rm -rf $(VENV) .mutants site data/cache data/runs
	find data/models -mindepth 1 -maxdepth 1 ! -exec test -e {}/README.md \; -exec rm -rf {} +
