# SPDX-License-Identifier: MIT
# `make` prints what there is. Everything is set up in .venv and build/; nothing outside this folder is written to.
PYTHON ?= python3
CC := $(if $(filter default,$(origin CC)),gcc,$(CC))
ARGS ?=
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
CSRC := dirtytrack/kernel/csrc
BESIDE := tests/unit tests/kernel/checkpoint tests/kernel/gc tests/kernel/test_storm.py tests/programs/test_images_alive.py
SANITIZED_BESIDE := tests/kernel/gc $(addprefix tests/kernel/test_,adaptive.py contract.py contract_gone.py contract_threads.py injection.py)
CORE := $(wildcard $(CSRC)/*.c)
HEADERS := $(wildcard $(CSRC)/*.h)
C_TESTS := $(wildcard tests/c/*.c)
C_TEST_HEADERS := $(wildcard tests/c/*.h)
C_FLAGS := -std=gnu11 -g -Wall -Wextra -Werror -fvisibility=hidden -pthread -I$(CSRC)
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
BROWSERS := chromium-headless-shell chromium google-chrome chrome chromium-browser
PACKAGES := make gcc libc6-dev python3 python3-venv python3-dev

export PIP_ROOT_USER_ACTION := ignore
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

.PHONY: help
help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# ---- setting up -----------------------------------------------------------------------------------------------------

.PHONY: check-tools
check-tools: ## say what this machine lacks to build, and the command that installs it
	@lacks=""; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || lacks="$$lacks Python>=3.10"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || lacks="$$lacks ensurepip"; \
	$(PYTHON) -c 'import os.path, sysconfig as s; open(os.path.join(s.get_path("include"), "Python.h")).close()' \
	    2>/dev/null || lacks="$$lacks Python.h"; \
	echo '#include <stdio.h>' | $(CC) -fsyntax-only -xc - 2>/dev/null || lacks="$$lacks C-compiler"; \
	if [ -n "$$lacks" ]; then \
	    echo "Missing:$$lacks. On Debian and Ubuntu, as root:" >&2; \
	    echo "    apt-get install --no-install-recommends $(PACKAGES)" >&2; \
	    exit 1; \
	fi

# Each stamp is a file in .venv: what it stands for has been done since its prerequisites changed.
$(VENV)/.made: pyproject.toml
	@$(MAKE) -s check-tools
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=25.1"
	$(PIP) install --group build
	@touch $@

# Editable: Python sources are used where they are. An edit to C is noticed here, by its date.
$(VENV)/.built: $(VENV)/.made $(CORE) $(HEADERS) dirtytrack/kernel/taking.c dirtytrack/kernel/_build.py setup.py pyproject.toml
	$(PIP) install --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.built pyproject.toml
	$(PIP) install --group test
	@touch $@

$(VENV)/.docs: $(VENV)/.built pyproject.toml
	$(PIP) install --group docs
	@touch $@

$(VENV)/.lint: $(VENV)/.test $(VENV)/.docs pyproject.toml
	$(PIP) install --group lint
	@touch $@

.PHONY: build
build: $(VENV)/.built ## set up .venv with what run-time needs, and build the extension there

# ---- running --------------------------------------------------------------------------------------------------------

.PHONY: programs
programs: ## install the programs that tests/programs attaches to, as root on Debian, where they are not there yet
	@lacks=""; \
	command -v redis-server >/dev/null && command -v redis-benchmark >/dev/null || lacks="$$lacks redis-server redis-tools"; \
	command -v node >/dev/null || lacks="$$lacks nodejs"; \
	command -v java >/dev/null || lacks="$$lacks default-jre-headless"; \
	command -v gdb >/dev/null || lacks="$$lacks gdb libc6-dbg"; \
	$(PYTHON) -c 'import os, sys; p = os.path.realpath(sys.executable) + "-gdb.py"; sys.exit( \
	    not any(map(os.path.exists, (p, "/usr/share/gdb/auto-load" + p))))' || lacks="$$lacks python3-dbg"; \
	[ -z "$$lacks" ] || RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$lacks

.PHONY: demo
demo: $(VENV)/.built ## set up, then index the standard library in tracked memory
	$(BIN)/dirtytrack demo $(ARGS)

.PHONY: doctor
doctor: $(VENV)/.built ## set up, then say what tracking needs here and whether it is there
	$(BIN)/dirtytrack doctor $(ARGS)

.PHONY: bench
bench: $(VENV)/.test ## measure, as ratios in one run against the bare ioctl (ARGS=... for a part)
	$(BIN)/python -m benchmarks $(ARGS)

.PHONY: bench-docs
bench-docs: $(VENV)/.test ## measure everything (ARGS="density phases": these), then rewrite the numbers and plots of docs/performance.md
	$(BIN)/python -m benchmarks --seconds 1.5 --write docs/benchmarks.json $(ARGS)
	$(BIN)/python docs/draw_tables.py docs/benchmarks.json docs/performance.md
	$(BIN)/python docs/draw_epochs.py docs/benchmarks.json docs/epochs.svg
	$(BIN)/python docs/draw_density.py docs/benchmarks.json docs/density.svg

.PHONY: bench-checkpoint
bench-checkpoint: $(VENV)/.test ## measure saves, beside PyTorch's too if make test-torch was run, for docs/checkpoint.md
	$(BIN)/python -m benchmarks --write docs/checkpointing.json checkpoint checkpoint_beside
	$(BIN)/python docs/draw_tables.py docs/checkpointing.json docs/checkpoint.md
	$(BIN)/python docs/draw_saving.py docs/checkpointing.json docs/saving.svg

.PHONY: bench-ranks
bench-ranks: $(VENV)/.test ## what it costs a rank to save together, at 1, 2 and 4, and modelled to 10,000, for docs/ranks.md
	$(BIN)/python -m benchmarks.ranks --write docs/ranks.json
	$(BIN)/python docs/draw_ranks.py docs/ranks.json docs/ranks.md

.PHONY: bench-objects
bench-objects: $(VENV)/.test ## measure saves to an object store, for docs/object-stores.md
	$(BIN)/python -m benchmarks --write docs/objects.json objects
	$(BIN)/python docs/draw_tables.py docs/objects.json docs/object-stores.md

.PHONY: bench-formats
bench-formats: $(VENV)/.test ## measure a zarr array that follows a tracked one, for docs/formats.md
	$(BIN)/python -m benchmarks --seconds 0.5 --write docs/formats.json zarr_rows
	$(BIN)/python docs/draw_tables.py docs/formats.json docs/formats.md

.PHONY: draw-observe
draw-observe: $(VENV)/.test ## run a small program, and draw it for docs/top.md and docs/heatmap.md
	$(BIN)/python docs/draw_observe.py docs/top.svg docs/heatmap.png

.PHONY: bench-observe
bench-observe: $(VENV)/.test ## measure what recording costs redis (apt-get install redis-server redis-tools), for docs/observe.md
	$(BIN)/python -m benchmarks.observe --write docs/observing.json
	$(BIN)/python docs/draw_observing.py docs/observing.json docs/observe.md

.PHONY: bench-images
bench-images: $(VENV)/.test ## save a redis under load, and gcore beside it (make programs, gdb), for docs/process-images.md
	$(BIN)/python -m benchmarks.process_images --write docs/process_images.json
	$(BIN)/python docs/draw_images.py docs/process_images.json docs/process-images.md

.PHONY: bench-barriers
bench-barriers: $(VENV)/.test ## measure write barriers side by side, and libgc (apt-get install libgc-dev), for docs/gc.md
	$(BIN)/python -m benchmarks.gc_barriers --write docs/barriers.json
	$(BIN)/python docs/draw_barriers.py docs/barriers.json docs/gc.md docs/barriers.svg

.PHONY: bench-migration
bench-migration: $(VENV)/.test ## migrations, and QEMU's beside them (apt-get install qemu-system-x86), for docs/migration.md
	$(BIN)/python -m benchmarks migration --write docs/moving.json
	$(BIN)/python -m benchmarks.migrating --write docs/migrating.json
	$(BIN)/python docs/draw_migration.py docs/moving.json docs/migrating.json docs/migration.md docs/migrating.svg

# ---- testing --------------------------------------------------------------------------------------------------------

# Side by side: a command on all of a folder but some of its paths, and on these, whose output comes after it.
# (command, folder, paths, log)
in_two_halves = $(1) $(3) >$(4) 2>&1 & beside=$$!; \
	$(1) $(2) $(3:%=--ignore %); status=$$?; \
	wait $$beside || status=1; \
	echo "== beside it: $(3)"; cat $(4); exit $$status

.PHONY: test
test: $(VENV)/.test c-test ## set up, then all tests; with CI=true a skipped test is a failure
ifneq ($(strip $(ARGS)),)
	$(BIN)/python -m pytest --durations=15 $(ARGS)
else
# Two runs side by side: what takes huge pages, swap or settings from the machine is all in the second.
	@mkdir -p build
	@$(call in_two_halves,$(BIN)/python -m pytest --durations=15,tests,$(BESIDE),build/beside.log)
endif

.PHONY: c-test
c-test: $(C_TESTS:tests/c/%.c=build/c/%.ran) ## the C core with its own tests, without Python

.PHONY: build-c
build-c: $(C_TESTS:tests/c/%.c=build/c/%) $(C_TESTS:tests/c/%.c=build/asan/%) ## those, and those with the sanitizers, but not run

.PHONY: test-torch
test-torch: $(VENV)/.test ## pages and tests on PyTorch, which it installs: large, so neither make test nor CI does
	$(PIP) install "$(TORCH)"
	$(BIN)/python -m pytest tests/unit/test_docs.py tests/kernel/test_delta_torch.py tests/kernel/checkpoint \
	    tests/unit/checkpoint -m torch $(ARGS)

.PHONY: radosgw
radosgw: $(VENV)/.test ## the tests of object stores against Ceph's, which it installs: as root on Debian, 400 MB, so CI does not
	@lacks=""; for program in radosgw radosgw-admin ceph-mon ceph-osd ceph monmaptool faketime; do \
	    command -v $$program >/dev/null || lacks="radosgw ceph-mon ceph-osd ceph-common faketime"; done; \
	[ -z "$$lacks" ] || RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$lacks
	DIRTYTRACK_S3=radosgw $(BIN)/python -m pytest --timeout=600 tests/unit/checkpoint/test_contract.py \
	    tests/unit/checkpoint/test_object_faults.py tests/kernel/checkpoint/test_object_stores.py $(ARGS)

.PHONY: azurite
azurite: $(VENV)/.test ## the tests of every kind of store against an emulator of Azure, which it installs in build: needs npm
	@[ -x build/azurite/node_modules/.bin/azurite-blob ] || \
	    { mkdir -p build/azurite && npm install --prefix build/azurite --no-audit --no-fund --silent azurite; }
	DIRTYTRACK_AZURITE=$(CURDIR)/build/azurite/node_modules/.bin/azurite-blob \
	    $(BIN)/python -m pytest tests/unit/checkpoint/test_contract.py $(ARGS)

.PHONY: check-browser
check-browser: ## say whether there is a browser for test-browser, and the command that installs one
	@for browser in $(BROWSERS); do ! command -v $$browser >/dev/null || exit 0; done; \
	echo "No browser. On Debian, as root: apt-get install --no-install-recommends chromium-headless-shell" >&2; exit 1

.PHONY: test-browser
test-browser: check-browser $(VENV)/.test ## the page of a heat map in Chromium, which must be there (CI installs it)
	$(BIN)/python -m pytest tests/unit/test_heat_page.py $(ARGS)

.PHONY: soak
soak: $(VENV)/.test ## the long storms: minutes to an hour
	DIRTYTRACK_SOAK=1 $(BIN)/python -m pytest -m soak --timeout=0 --durations=0 $(ARGS)

.PHONY: sanitize
sanitize: sanitize-c sanitize-kernel ## C tests and kernel tests under address and undefined-behaviour sanitizers

.PHONY: sanitize-c
sanitize-c: $(C_TESTS:tests/c/%.c=build/asan/%.ran) ## the C tests under the sanitizers, leaks included

.PHONY: sanitize-kernel
sanitize-kernel: $(VENV)/.test ## the kernel tests against an extension built with the sanitizers
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r dirtytrack tests examples benchmarks docs pyproject.toml setup.py README.md LICENSE build/sanitize
	find build/sanitize -name '*.so' -delete
	cd build/sanitize && CFLAGS="-O1 -g $(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	    $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	@cd build/sanitize; \
	run() { LD_PRELOAD=$$($(CC) -print-file-name=libasan.so) PYTHONPATH=$(CURDIR)/build/sanitize \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 DIRTYTRACK_SANITIZE=1 \
	    $(CURDIR)/$(BIN)/python -m pytest -p no:faulthandler -p no:cacheprovider --timeout=600 --durations=15 "$$@"; }; \
	$(call in_two_halves,run $(ARGS),tests/kernel,$(SANITIZED_BESIDE),beside.log)

.PHONY: pythons
pythons: $(VENV)/.built ## one wheel from the sdist, installed and tried in each of Python 3.10-3.13 found here
	rm -rf build/pythons && mkdir -p build/pythons
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("build/pythons")' >/dev/null
	$(PIP) wheel --no-deps -w build/pythons build/pythons/*.tar.gz
	@tried=0; for version in 3.10 3.11 3.12 3.13; do \
	    for python in python$$version "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python; do \
	        $$python -c 'import ensurepip' 2>/dev/null || continue; \
	        echo "== Python $$version ($$python)"; \
	        $$python -m venv build/pythons/$$version && \
	        build/pythons/$$version/bin/python -m pip -q --disable-pip-version-check install build/pythons/*.whl && \
	        (cd build/pythons/$$version && bin/dirtytrack doctor) && \
	        build/pythons/$$version/bin/python -m pip -q --disable-pip-version-check install numpy && \
	        for example in examples/*.py; do \
	            build/pythons/$$version/bin/python -I -W error $$example || [ $$? -eq 77 ] || exit 1; \
	        done \
	        || exit 1; \
	        tried=$$((tried + 1)); break; \
	    done; \
	done; echo "$$tried of Python 3.10-3.13 found, each works with $$(basename build/pythons/*.whl)"; [ $$tried -gt 0 ]

.PHONY: kernels
kernels: $(VENV)/.test ## all tests in Debian's kernels, emulated, and docs/support-matrix.md from what came of it: hours
	$(BIN)/python -m kernels $(ARGS); status=$$?; $(BIN)/python -m kernels.matrix; exit $$status

.PHONY: kernels-smoke
kernels-smoke: $(VENV)/.test ## the C tests that ask the kernel, in one that needs the remedies
	$(BIN)/python -m kernels --smoke

.PHONY: lint
lint: $(VENV)/.lint lint-c docs ## format, ruff, mypy --strict, the C core and the docs under every warning
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: lint-c
lint-c: ## compile the C core by gcc, and by clang where there is one, warnings being errors
	@for compiler in gcc clang; do \
	    command -v $$compiler >/dev/null || { echo "no $$compiler here"; continue; }; \
	    for file in $(CORE) $(C_TESTS) $(wildcard examples/*.c examples/*/*.c); do \
	        $$compiler $(C_FLAGS) -D_GNU_SOURCE= -O2 -c $$file -o /dev/null || exit 1; \
	    done; \
	    echo "$$compiler: no warnings"; \
	done

.PHONY: docs
docs: $(VENV)/.docs ## build the documentation into build/docs; a reference that leads nowhere is an error
	$(BIN)/sphinx-build -q -E -n -W --keep-going -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

.PHONY: format
format: $(VENV)/.lint ## rewrite the Python sources as ruff formats them
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

docs/epoch.svg: docs/draw_epoch.py
	$(PYTHON) docs/draw_epoch.py $@

.PHONY: clean
clean: ## remove what was built and set up
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f dirtytrack/kernel/_core*.so dirtytrack/kernel/_core.c
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- the C tests: build/c plainly, build/asan with the sanitizers ---------------------------------------------------

build/c/%.o: $(CSRC)/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) -O2 -c $< -o $@
build/c/%: tests/c/%.c $(CORE:$(CSRC)/%.c=build/c/%.o) $(HEADERS) $(C_TEST_HEADERS)
	$(CC) $(C_FLAGS) -D_GNU_SOURCE= -O2 $(filter %.c %.o,$^) -o $@
build/asan/%.o: $(CSRC)/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) $(SANITIZE) -O1 -c $< -o $@
build/asan/%: tests/c/%.c $(CORE:$(CSRC)/%.c=build/asan/%.o) $(HEADERS) $(C_TEST_HEADERS)
	$(CC) $(C_FLAGS) -D_GNU_SOURCE= $(SANITIZE) -O1 $(filter %.c %.o,$^) -o $@
.PRECIOUS: build/c/% build/c/%.o build/asan/% build/asan/%.o
.PHONY: FORCE
FORCE:
build/%.ran: build/% FORCE
	$<
