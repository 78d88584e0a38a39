# Everything a newcomer needs; plain `make` lists it. Each target sets the machine up first (seconds when done).
SHELL := /bin/bash
.DEFAULT_GOAL := help

CACHE := $(or $(MYCEL_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mycel)
BIN := .venv/bin
# What bcc compiles against (scripts/setup merges it).
export BCC_KERNEL_SOURCE ?= $(CACHE)/headers/current

.PHONY: help setup image kubernetes demo demo-kubernetes test soak check bench fmt clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup: ## Debian packages, kernel headers for bcc, .venv
	@scripts/setup

image: setup ## container images (OCI archives, SBOM, sizes) in build/images, without a daemon
	@$(BIN)/python -m deploy.images

demo: setup ## two nodes, a canary, mTLS, policy: one story, checked, under two minutes (root)
	@$(BIN)/mycel demo

demo-kubernetes: image kubernetes ## the same story on a real Kubernetes of two nodes: install, label, kubectl apply (root)
	@$(BIN)/python -m lab.kubernetes.demo

kubernetes: setup ## the programs of a real Kubernetes, for the cluster lab (ten minutes once, 0.8 GB in the cache)
	@lab/kubernetes/programs/build >/dev/null

test: setup kubernetes ## all tests, unit to real kernel (root); one: make test ARGS="tests/unit -k logs"
	@scripts/test $(ARGS)

soak: setup kubernetes ## the longer proofs, whole (root): five minutes without an API server, a node that stays away
	@MYCEL_SOAK=1 scripts/test -m soak $(ARGS)

check: setup ## lint, formatting, types, import rules, C style
	@scripts/check

bench: setup ## against no mesh and Envoy, on this machine (root); some rows: make bench ROWS=same-node-l4
	@$(BIN)/python -m bench $(if $(ROWS),--rows $(ROWS))

fmt: setup ## format Python and C, apply safe fixes
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix-only .
	@git ls-files -co --exclude-standard 'bpf/*.c' 'bpf/*.h' | xargs -r clang-format -i

clean: ## remove what was built here (.venv and build/, not the cache)
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
