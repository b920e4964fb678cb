# Two commands: `make train` and `make test`. Python 3.11 or newer and make are all that must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: train test lint install clean

train: install  ## a first run: four ranks on this machine, about two minutes on 2 cores
	$(BIN)/sparing train experiment=tiny

# Bytecode is kept whatever the environment says: hundreds of processes import the same files.
test: install  ## the whole suite, two files at a time
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .

install: $(STAMP)

# The constraints pin torch to one release; where it has a CUDA build, pip takes that one.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # on every core, as pip does not; templates do not compile
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
