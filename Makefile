# make run    text to a chatting, RL-tuned model on this machine     make test    the tests     make test-all    with every matrix
# All set the environment up first; that needs the network once, and does nothing while the pins stay as they are.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup run test test-all clean

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check $(if $(MAKE_TERMOUT),,--quiet --quiet)
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
REQUIREMENTS := requirements/host.txt requirements/host-lock.txt requirements/host-no-deps.txt
RUNFILE ?= configs/glm45/tiny.yaml
# Extra words for the command: make run ARGS="--dry-run", make test ARGS="tests/metrics -x"
ARGS ?=

help:
	@cat <<-'TEXT'
		make setup               create .venv and install the pinned packages; does nothing when that is done
		make run  [ARGS=...]     glm run configs/glm45/tiny.yaml   (another one: RUNFILE=...)
		make test [ARGS=...]     pytest, of every matrix the quick cases
		make test-all [ARGS=...] pytest, the whole of every matrix: up to an hour
		make clean               remove caches and build leftovers; .venv and runs/ stay
		PYTHON=python3.12        the interpreter .venv is made with; the first of python3, python3.11 ... 3.13 that fits if not given
	TEXT

# Stamps hold what was installed, not when: touching the files installs nothing, an interrupted install is done again.
setup:
	@refuse() {    # what is wrong, what was found, what to do
		echo "make setup: $$1" >&2
		echo "  found:    $$2" >&2
		echo "  expected: Python 3.11, 3.12 or 3.13, for which the pinned packages exist" >&2
		echo "  to do:    $$3" >&2
		exit 2
	}
	if ! $(VENV)/bin/python -c '' 2>/dev/null; then
		chosen=
		for candidate in $(or $(PYTHON),python3 python3.11 python3.12 python3.13); do
			if "$$candidate" -c '$(FITS)' 2>/dev/null; then chosen=$$candidate; break; fi
		done
		if [ -z "$$chosen" ]; then
			refuse "no usable interpreter among: $(or $(PYTHON),python3 python3.11 python3.12 python3.13)" \
				"$$($(or $(PYTHON),python3) --version 2>&1 || true)" "install one, or name it: make setup PYTHON=/path/to/python3.11"
		fi
		if ! "$$chosen" -m venv --clear $(VENV); then
			echo "make setup: $$chosen cannot make a virtual environment; on Debian and Ubuntu the package python3-venv is missing" >&2
			exit 2
		fi
	elif ! $(VENV)/bin/python -c '$(FITS)'; then
		refuse "$(VENV) was made with another interpreter" "$$($(VENV)/bin/python --version 2>&1)" \
			"rm -r $(VENV), then make setup (PYTHON=/path/to/python3.11 names one)"
	fi
	wanted=$$(cat $(REQUIREMENTS) | cksum)
	if [ "$$wanted" != "$$(cat $(VENV)/.installed-requirements 2>/dev/null || true)" ]; then
		echo "make setup: installing the pinned packages (about two minutes, 3 GB)"
		$(PIP) install -r requirements/host.txt -c requirements/host-lock.txt
		$(PIP) install --no-deps -r requirements/host-no-deps.txt
		echo "$$wanted" > $(VENV)/.installed-requirements
	fi
	wanted="$$(cksum < pyproject.toml) $(CURDIR)"
	if [ "$$wanted" != "$$(cat $(VENV)/.installed-package 2>/dev/null || true)" ]; then
		$(PIP) install --no-deps --no-build-isolation -e .
		echo "$$wanted" > $(VENV)/.installed-package
	fi

run: setup
	@$(VENV)/bin/glm run $(RUNFILE) $(ARGS)

test: setup
	@$(VENV)/bin/python -m pytest $(ARGS)

test-all: setup
	@$(VENV)/bin/python -m pytest -m '' $(ARGS)

clean:
	@rm -rf build *.egg-info .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -name __pycache__ -type d -print0 | xargs -0 -r rm -rf
