# Critical Pathways. Every target does its own set-up, in .venv; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
# STUDENT=1 builds the site without the solutions of the exercises, beside the other.
OUT := $(CURDIR)$(if $(STUDENT),/_build/student)
STAGE := $(OUT)/_build/source
SITE := $(OUT)/_build/html/index.html
CHAPTERS := $(sort $(wildcard book/*.ipynb))

# The threads of PyTorch: every processor this process may use.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
# A run needs no notices, and leaves no byte code in the reader's tree.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
# Jupyter's own platform folders, and no kernel of the user's that happens to be called python3 too.
export JUPYTER_PLATFORM_DIRS := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help book html pdf assignments slides test test-environments execute experiments benchmark lint audit data browser clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

# --- set-up: each stamp is made once, and again when what it was made from changes ---

.venv/stamp-book: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[book,test,imagenet,cluster]'
	touch $@

.venv/stamp-dev: .venv/stamp-book
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[book,test,imagenet,cluster,dev]'
	touch $@

node_modules/stamp: package.json package-lock.json
	npm ci --no-audit --no-fund --loglevel=error
	touch $@

# Fetched here, with a progress bar, so that no notebook has to (it is checked, and cached for the user).
data: .venv/stamp-book  ## fetch CIFAR-10 into the user's cache
	$(BIN)/python -c 'import pathwaylib; [pathwaylib.cifar10(split) for split in ("train", "test")]'

# The browser tests use a Chromium of the machine; they skip, with this reason, where there is none.
browser: .venv/stamp-book  ## see to it that there is a Chromium (installs it where that needs no password)
	@if $(BIN)/python tests/chromium.py; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo 'No Chromium found; installing the package chromium'; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null \
			&& $(BIN)/python tests/chromium.py || echo 'That failed: the browser tests will be skipped'; \
	else echo 'No Chromium found (set CHROMIUM=...): the browser tests will be skipped'; fi

# --- the book: built from a copy, so the working tree stays as it is ---

define stage
	rm -rf $(STAGE) && mkdir -p $(STAGE)
	cp -pR _config.yml _toc.yml book $(STAGE)/
	$(if $(STUDENT),$(BIN)/python tools/notebooks.py unsolve $(CHAPTERS:%=$(STAGE)/%))
	$(if $(PATHWAYS_REPOSITORY_URL),$(BIN)/python tools/environments.py badge $(CHAPTERS:%=$(STAGE)/%))
endef

define build
	cd $(STAGE) && $(CURDIR)/$(BIN)/jupyter-book build . --path-output $(OUT) -W --keep-going --all --quiet
	@touch $(SITE)
	@echo "Built $(SITE) ($$(du -sh $(OUT)/_build/html | cut -f1))"
endef

book: .venv/stamp-book node_modules/stamp data  ## execute every chapter and build the site
	$(stage)
	$(BIN)/python tools/notebooks.py execute $(CHAPTERS:%=$(STAGE)/%)
	$(build)

html: .venv/stamp-book node_modules/stamp  ## build the site from the stored outputs
	$(stage)
	$(build)

pdf: html browser  ## print the whole book into _build/critical-pathways.pdf
	$(BIN)/python tools/pdf.py $(dir $(SITE)) _build/critical-pathways$(if $(STUDENT),-student).pdf

execute: .venv/stamp-book data  ## maintainers: execute every chapter in place, to be committed
	$(BIN)/python tools/notebooks.py execute $(CHAPTERS)

# --- for a course ---

assignments: .venv/stamp-book  ## write the assignments, for students and for teachers
	$(BIN)/python tools/notebooks.py release assignments/*.ipynb --to _build/assignments
	@echo "Wrote $(CURDIR)/_build/assignments"

slides: .venv/stamp-book node_modules/stamp  ## make lecture slides of the chapters
	$(BIN)/python tools/slides.py $(CHAPTERS) --to _build/slides

# --- checks ---

test: .venv/stamp-book data browser html  ## unit tests, doctests, every chapter under nbval, the site in a browser
	$(BIN)/python -m pytest --nbval --nbval-kernel-name python3 --nbval-sanitize-with tests/nbval_sanitize.cfg \
		tests pathwaylib $(CHAPTERS)

# Half an hour and 15 GB of disk, so once a week, and before a release.
test-environments: .venv/stamp-book  ## every chapter as Colab runs it, with our versions and the lowest supported
	$(BIN)/python tools/environments.py run $(CHAPTERS)
	$(BIN)/python tools/environments.py write $(CHAPTERS)

lint: .venv/stamp-dev  ## ruff, mypy (strict), codespell, notebook hygiene
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python tools/notebooks.py check $(CHAPTERS)

# pip-audit lives apart: what it needs is none of the packages that it looks up.
.venv/audit/stamp: .venv/stamp-book
	$(BIN)/python -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet 'pip-audit>=2.10,<3'
	touch $@

audit: .venv/audit/stamp  ## look the pinned packages up in OSV's list of vulnerabilities (needs that service)
	.venv/audit/bin/python tools/audit.py

benchmark: .venv/stamp-book  ## time the library: against its floor, and against plain code
	$(BIN)/python benchmarks/core.py
	$(BIN)/python benchmarks/many_runs.py
	$(BIN)/python benchmarks/extraction.py

# Without train_subjects.ipynb: it would replace the networks that all tables were computed with.
experiments: .venv/stamp-book data  ## compute the tables that are missing in experiments/results (each takes hours)
	cd experiments && set -e; for notebook in $(filter-out train_%,$(notdir $(wildcard experiments/*.ipynb))); do \
		$(CURDIR)/$(BIN)/papermill -p profile full "$$notebook" /dev/null; done

clean:  ## remove what was built and installed here
	rm -rf _build build dist .venv node_modules *.egg-info
