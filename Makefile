# Two commands do everything on a machine with Python 3.10-3.13, git and make:
#   make train   set up, then CG3D's pre-training on the bundled set
#   make test    set up, then the whole gate: exported code, formatting, import direction, docs, notebooks, pytest
#   make test JOBS=4  the same with four processes (default 2)
#   make docs    the documentation site in _docs/site (offline)
#   make matrix  the core with several versions of torch, each in an environment of its own (downloads gigabytes)
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
export HF_HUB_OFFLINE ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: env train test check style docs matrix data lock audit clean

env: $(BIN)/.ready

$(BIN)/.ready: settings.ini setup.py
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else f"cg3d needs Python 3.10-3.13, $(PYTHON) is {v[0]}.{v[1]}; try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[all,dev]'
	mkdir -p runs
	touch $@

train: env
	mkdir -p runs
	$(BIN)/papermill nbs/train.ipynb runs/train.ipynb -f recipes/quick.yaml -p overwrite True
	@echo "The executed notebook is runs/train.ipynb; results, figures and the checkpoint are in runs/quick."

check: env
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	git diff --exit-code -- nbs cg3d

style: env
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports

docs: env
	$(BIN)/python docs/build.py

test: check style docs
	cd nbs && ../$(BIN)/nbdev_test --path . --file_re '^[0-9]' --n_workers $(JOBS) --pause 0.5 --timing
	$(BIN)/python -m pytest tests -q -n $(JOBS) --dist loadfile

matrix: env
	$(BIN)/python tests/matrix.py

data: env
	$(BIN)/python recipes/nano/build_furniture.py --out data

lock: env
	$(BIN)/uv pip compile --quiet --generate-hashes --python-version 3.11 --all-extras pyproject.toml -o requirements-dev.lock

audit: env
	$(BIN)/uv tool run pip-audit --strict --require-hashes --disable-pip -r requirements-dev.lock

clean:
	rm -rf .venv runs build dist *.egg-info
