# Each target does all its own set-up; see .ci/setup for what that is. On Debian 12, as root.
#   make demo    three namespaces, a policy, real traffic: what gets through and what does not
#   make test    lint and all tests (make test-image: those of the image)
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup packages toolchain peers machine absent bpf demo test test-image lint starts operations containers bench bench-life bench-micro lock clean

ARCH := $(shell uname -m | sed 's/x86_64/x86/; s/aarch64/arm64/')
OBJECTS := isolator/datapath/objects
PROGRAMS := $(patsubst bpf/%.bpf.c,$(OBJECTS)/%.bpf.o,$(wildcard bpf/*.bpf.c))
BPF_CFLAGS := -O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -Wno-missing-declarations \
	-target bpf -mcpu=v3 -D__TARGET_ARCH_$(ARCH) -Ibpf -idirafter /usr/include/$(shell uname -m)-linux-gnu
export PATH := $(PATH):/usr/sbin:/sbin

help:
	@sed -n 's/^#   //p' Makefile

setup: packages build/venv

# Looked at each time: it takes a moment, and a machine changes.
packages:
	@.ci/setup packages

toolchain:
	@.ci/setup toolchain

peers: packages
	@.ci/setup peers

machine:
	@.ci/setup machine

build/venv: requirements.lock pyproject.toml .ci/setup .ci/uv.lock $(if $(wildcard .venv/bin/isolator),,absent) | packages
	@mkdir -p build
	@.ci/setup venv
	@touch $@

absent:

bpf: $(PROGRAMS)

$(OBJECTS)/%.bpf.o: bpf/%.bpf.c $(wildcard bpf/*.h) | toolchain
	@mkdir -p $(OBJECTS)
	clang $(BPF_CFLAGS) -c $< -o $@
	@llvm-strip -g $@

demo: machine setup bpf
	.venv/bin/isolator demo

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache

test: machine setup bpf lint
	.venv/bin/python -m pytest -m "not image"

# The agent's image: built from package registries, run as the README says, removed and run again.
test-image: machine setup bpf
	.venv/bin/python -m pytest -m image

# Bars with a real engine, each printing its figure.
starts: machine setup bpf
	ISOLATOR_STARTS=50 .venv/bin/python -m pytest -q -s tests/e2e/test_starts.py

operations: machine setup bpf
	ISOLATOR_OPERATIONS=200 .venv/bin/python -m pytest -q -s tests/e2e/test_docker_life.py -k random

containers: machine setup bpf
	ISOLATOR_CONTAINERS=100 .venv/bin/python -m pytest -q -s tests/e2e/test_docker_life.py -k many

bench: machine setup bpf peers
	.venv/bin/python -m benchmarks run --quick --report build/bench

bench-life: machine setup bpf
	.venv/bin/python -m benchmarks life

# What single steps cost; of those named with ONLY, into JSON=FILE.
bench-micro: machine setup bpf
	.venv/bin/python -m benchmarks.micro --only "$(ONLY)" $(if $(JSON),-o $(JSON))

# The versions of everything that is installed; renew it with `make lock` after a change in pyproject.toml.
lock: setup
	build/bootstrap/bin/uv pip compile pyproject.toml --extra dev --extra bench --python-version 3.11 \
		--generate-hashes --no-header -q -o requirements.lock

clean:
	rm -rf build $(OBJECTS) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
