# `make help` lists what there is. Every target does the set-up that it needs.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Debian's Rust where .ci/setup puts it before an older one; where rustup puts its programs, for
# shells that were not told; mkfs and its like for people.
export PATH := $(CURDIR)/.cache/rust:$(PATH):$(HOME)/.cargo/bin:/usr/sbin:/sbin

# Daemons start some thousand times in the tests: their modules are compiled once.
unexport PYTHONDONTWRITEBYTECODE

PYTHON := .venv/bin/python
CARGO_FLAGS := --manifest-path engine/Cargo.toml --locked
TESTS ?= tests
PYTEST_FLAGS ?=
# Tests side by side. Most of what they do is to wait, so more than there are cores; where there are
# many cores, the disk is what they share.
WORKERS ?= 4
SIDE_BY_SIDE := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
# What needs no root; for anything else sudo is asked where this is not root.
ROOTLESS := tests/unit% tests/sim% tests/engine% tests/cluster%
AS_ROOT := $(PYTHON) .ci/as_root.py
SEED ?=
ROUNDS ?=
FRAMES ?=
# For the shell to expand, as a file's name may hold blanks and quotes.
export IMAGE ?=
FAULT ?=
HOURS ?= 8

MEASURES ?=
TOLERANCE ?=

.PHONY: help setup build demo test test-deploy check fix sim faults soak stalls heal bench \
    bench-smoke bench-picture wheel bundle clean

help: ## List what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) \
	    | while IFS=$$'\t' read -r name text; do printf '  make %-11s %s\n' "$$name" "$$text"; done

setup: ## Install what is missing: system packages, Rust, .venv, the engine (Debian 12; root or sudo)
	@.ci/setup

build: setup ## The same: everything needed to run `.venv/bin/hci`

demo: setup ## Boot a guest from a replicated image and kill a node under it (IMAGE=some.qcow2: your own)
	@$(PYTHON) -m tests.e2e.demo $${IMAGE:+--image "$$IMAGE"}

test: setup ## All tests, as root (TESTS=tests/unit for a part, PYTEST_FLAGS="-k name", WORKERS=0 in turn)
	$(if $(filter-out $(ROOTLESS),$(TESTS)),$(AS_ROOT) )$(PYTHON) -m pytest $(SIDE_BY_SIDE) $(TESTS) \
	    $(if $(filter tests,$(TESTS)),--ignore=tests/deploy) $(PYTEST_FLAGS)

test-deploy: bundle ## Ansible sets clusters up on hosts that boot systemd, as root: 10 minutes
	@.ci/setup deploy
	$(AS_ROOT) $(PYTHON) -m pytest tests/deploy $(PYTEST_FLAGS)

check: setup ## Format, lint, types, stubs, layers: under 90 s warm
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m mypy.stubtest --mypy-config-file pyproject.toml engine._engine
	$(PYTHON) -m pytest --quiet tests/unit/test_layers.py
	cargo fmt --manifest-path engine/Cargo.toml --all --check
	cargo clippy --quiet $(CARGO_FLAGS) --workspace --all-targets \
	    --features simulation -- -D warnings

fix: setup ## Repair what `check` can repair by itself, and write the generated code anew
	$(PYTHON) -m ruff check --fix-only .
	$(PYTHON) -m ruff format .
	cargo fmt --manifest-path engine/Cargo.toml --all
	$(PYTHON) .ci/generate.py

sim: setup ## The simulator (SEED=n replays a history and prints it, FRAMES=1 with each frame; ROUNDS=n)
	@HCI_SIM_SEED=$(SEED) HCI_SIM_ROUNDS=$(ROUNDS) HCI_SIM_FRAMES=$(FRAMES) \
	    $(PYTHON) -m pytest $(if $(SEED)$(ROUNDS),-s tests/sim/test_histories.py,tests/sim) $(PYTEST_FLAGS)

faults: setup ## Every fault at random moments under load: 50 minutes (FAULT=name, ROUNDS=12 kills, SEED=n)
	@$(if $(SEED),HCI_FAULT_SEED=$(SEED)) HCI_FAULT=$(or $(FAULT),each) \
	    HCI_FAULT_ROUNDS=$(if $(FAULT),$(or $(ROUNDS),1),$(or $(ROUNDS),12)) \
	    $(PYTHON) -m pytest -s --timeout=$$((600 + 60 * $(or $(ROUNDS),12))) \
	    $(addprefix tests/faults/test_,$(if $(FAULT),,kill_node.py kill_gateway.py kill_all.py \
	    partition.py) fio_through_faults.py database.py) $(PYTEST_FLAGS)

soak: setup ## Simulated histories from a seed by chance, for HOURS=8
	@$(PYTHON) -m tests.sim.many --chance --hours $(HOURS)

stalls: setup ## Measure how long a guest waits when something dies, beside the budgets (ROUNDS=5, SEED=n)
	@$(AS_ROOT) $(PYTHON) -m tests.tools.stalls --json bench/results/stalls.json \
	    $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SEED),--seed $(SEED))

heal: setup ## Count what travels in a heal, and what guests keep beside it: 15 GB of disk (ROUNDS=3)
	@$(AS_ROOT) $(PYTHON) -m tests.tools.heal --json bench/results/heal.json $(if $(ROUNDS),--rounds $(ROUNDS))

bench: setup bench-picture ## Measure against nbdkit, Gluster and more: 25 minutes (MEASURES="rows guest": a part)
	@$(PYTHON) -m bench $(if $(MEASURES),--only $(MEASURES))

bench-smoke: setup ## Only beside nbdkit: is it slower than the last release? (TOLERANCE=0.75): 3 minutes
	@$(PYTHON) -m bench --only rows --systems hci nbdkit --rounds 3 --runtime 2 --limit 6 --compare \
	    $(if $(TOLERANCE),--tolerance $(TOLERANCE))

# What draws the picture is large and needed for nothing else; without it the figures are the same.
bench-picture: setup
	@$(PYTHON) -c 'import matplotlib' 2>/dev/null \
	    || $(PYTHON) -m pip install --quiet --disable-pip-version-check --group bench \
	    || echo 'bench: matplotlib cannot be installed, so there will be no picture' >&2

wheel: setup ## A wheel and an sdist in dist/
	$(PYTHON) -m maturin build --release --locked --sdist --out dist

bundle: wheel ## What hosts install without compiler or internet, in dist/
	$(PYTHON) .ci/bundle.py

clean: ## Remove all that was built; the system's packages stay
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis dist engine/target \
	    engine/_engine*.so bench/results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
