# Everything a newcomer needs: `make quickstart`, `make test`. Everything a change needs: `make check`.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
EXTRA ?= cpu
JOBS ?= 3
BLACK_BOX := seqkd soda gad ranked advised cross_tokenizer two_teachers

# uv reads no pip settings: a wheel folder configured for pip is passed on; without one, uv's own CPU torch index is used.
LINKS := $(or $(PIP_FIND_LINKS),$(shell python3 -m pip config get global.find-links 2>/dev/null))
UV_SOURCES := $(if $(LINKS),$(foreach l,$(LINKS),--find-links $(l)),$(if $(filter cpu,$(EXTRA)),--torch-backend cpu))

export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1
unexport PYTHONDONTWRITEBYTECODE # a run starts a dozen processes of ours, each of which would compile us anew

.PHONY: help setup tools quickstart opsd black-box test long chaos deploy-check check docs bench clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(VENV)/.ready ## make .venv with everything a CPU machine needs (EXTRA=gpu for CUDA)

$(VENV)/.ready: pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(PYTHON) $(UV_SOURCES) --editable '.[$(EXTRA),dev]'
	touch $@

quickstart: setup ## distil a student on this machine; report in runs/quickstart/report.html
	$(VENV)/bin/potstill quickstart $(ARGS)

opsd: setup ## the same with the student as its own teacher
	$(VENV)/bin/potstill quickstart --recipe opsd $(ARGS)

black-box: setup ## teachers of which only text can be had, of another tokenizer, or several: before and after, as JSON
	$(PYTHON) -m bench.recipes $(BLACK_BOX) --runs runs $(ARGS)

tools: ## PostgreSQL, Chromium, promtool and ShellCheck, which the tests start: installed where that can be done
	.ci/tools

test: setup tools ## all tests but the longest, side by side where they can be (JOBS=3)
	$(PYTHON) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

long: setup ## the tests that `make test` leaves out for their time
	.ci/tools long
	$(PYTHON) -m pytest -m long --durations=10 $(ARGS)

chaos: setup ## kill, freeze, cut off and starve real runs, one after another: forty minutes on two cores; more of it as root
	$(PYTHON) -m pytest tests/chaos -s --durations=0 $(ARGS)

deploy-check: setup ## everything in deploy/, the long tests too: a fresh installation, Slurm, two machines; as root
	.ci/tools long
	$(PYTHON) -m pytest tests/deploy tests/contract/test_moving.py -m 'long or not long' --durations=10 $(ARGS)

check: setup ## style, types, import rules
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: setup ## remake docs/config.md from the config, docs/methods.md from the presets and docs/cli.md from the commands
	$(PYTHON) -m potstill.config_page > docs/config.md
	$(PYTHON) -m potstill.methods_page > docs/methods.md
	$(PYTHON) -m potstill.cli_page > docs/cli.md

bench: setup ## the figures of the docs, as JSON
	$(PYTHON) -m bench.steady_state
	$(PYTHON) -m bench.quickstart

clean: ## remove the environment; runs/ stays
	rm -rf $(VENV)
