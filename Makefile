# Tidemill. `make serve` chats, `make test` proves; `make help` lists the rest.
# Needs Rust, Python 3 and a C compiler; everything else is fetched into .cache/ (tools) and $(DATA) (models).

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CARGO  ?= cargo
PYTHON ?= python3
DATA   ?= ./data
CACHE  ?= $(CURDIR)/.cache
TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
BIN    := $(TARGET)/release/tidemill
# What the tests start: built with checks of overflow and of our own invariants, and only once for all tests.
TEST_BIN := $(TARGET)/debug/tidemill
ARGS   ?=
# Processes that share the files of end-to-end tests, much of whose time is waiting; 0 is none but pytest's own.
E2E_WORKERS ?= 2

VENV       := $(CACHE)/test-venv
NODE       := $(CACHE)/node
# Each in a venv of its own: their pins and the tests' do not agree.
LABEL_STUDIO := $(CACHE)/label-studio-venv
ARGILLA      := $(CACHE)/argilla-venv
# The compiler of the CUDA kernels, which needs no card.
NVRTC      := $(CACHE)/nvrtc
# What a machine with a card needs of this one: programs and compiled kernels. A driver takes no code of a compiler of a newer major version,
# so the kernels that are carried are of the last one of CUDA 12.
GPU        := $(CACHE)/gpu
GPU_NVRTC  := $(CACHE)/nvrtc-12
# The kinds of card that it is for; none: all that there are. And where the check's table goes.
GPU_ARCH ?=
REPORT   ?= $(GPU)/report.md
TEST_DATA  := $(CACHE)/test-data
TEST_MODEL := $(TEST_DATA)/models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: gpu-build gpu-check tour chromium c++ help serve build test lint environments test-build test-rust test-e2e demo demo-short demo-word demo-json demo-loop bench bench-store bench-train bench-beside oracle clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

serve: build ## build, fetch the default model once, serve on 127.0.0.1:8080 (ARGS="--port 9000 ...")
	$(BIN) pull --data $(DATA)
	exec $(BIN) serve --data $(DATA) $(ARGS)

build: ## the release binary
	$(CARGO) build --release --locked

# What the tests need is fetched while the compiler works.
test: ## everything: lints, unit and property tests, the real model, real clients
	$(MAKE) environments & fetching=$$!; trap 'kill $$fetching 2>/dev/null || true; wait $$fetching || true' EXIT; \
	trap 'exit 130' INT; trap 'exit 143' TERM; $(MAKE) lint; wait $$fetching; trap - EXIT
	$(MAKE) test-rust
	$(MAKE) test-e2e

environments: c++ chromium $(NVRTC)/ready $(VENV)/ready $(NODE)/ready $(LABEL_STUDIO)/ready $(ARGILLA)/ready

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

# Properties are tried on the same cases every time; `cargo test` by hand draws new ones.
test-rust: $(TEST_MODEL) $(NVRTC)/ready c++
	LD_LIBRARY_PATH=$(NVRTC)/nvidia/cu13/lib$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH} \
	PROPTEST_RNG_SEED=1 TIDEMILL_TEST_MODEL=$(TEST_MODEL) CACHE=$(CACHE) tests/postgres.sh $(CARGO) test --workspace --locked

test-build:
	$(CARGO) test --workspace --locked --no-run

test-e2e: $(TEST_MODEL) $(VENV)/ready $(NODE)/ready chromium $(LABEL_STUDIO)/ready $(ARGILLA)/ready
	TIDEMILL_BIN=$(TEST_BIN) TIDEMILL_TEST_MODEL=$(TEST_MODEL) \
	TIDEMILL_LABEL_STUDIO=$(LABEL_STUDIO)/bin/label-studio TIDEMILL_ARGILLA_PYTHON=$(ARGILLA)/bin/python \
	TIDEMILL_NODE_MODULES=$(NODE)/node_modules \
	$(VENV)/bin/python -m pytest tests/e2e -q -n $(E2E_WORKERS) --dist loadfile --no-loadscope-reorder

$(TEST_MODEL): | test-build
	$(TEST_BIN) pull --data $(TEST_DATA)
	@test -f $@

# CUDA kernels are tested as host programs.
c++:
	@command -v $(or $(CXX),c++) >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install -y --no-install-recommends g++; } \
		|| { echo "install a C++ compiler (Debian: apt-get install g++)"; exit 1; }

$(NVRTC)/ready: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(NVRTC) nvidia-cuda-nvrtc==13.0.88
	touch $@

$(GPU_NVRTC)/ready: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(GPU_NVRTC) nvidia-cuda-nvrtc-cu12==12.9.86
	touch $@

# The labeling page is tested in a real browser. Two installations at once would be in each other's way.
chromium: | c++
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; } \
		|| { echo "install chromium (Debian: apt-get install chromium)"; exit 1; }

$(VENV)/ready: tests/e2e/requirements.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# Official clients for Node; Node itself and npm come with the tests' Python packages.
$(NODE)/ready: tests/e2e/node/package-lock.json tests/e2e/node/package.json $(VENV)/ready
	mkdir -p $(@D)
	cp tests/e2e/node/package.json tests/e2e/node/package-lock.json $(@D)
	cd $(@D) && $(VENV)/bin/npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	touch $@

# The real Label Studio (1 GB, about 80 s) and Argilla's SDK (450 MB, about 20 s).
$(LABEL_STUDIO)/ready: tests/e2e/label_studio.lock
$(ARGILLA)/ready: tests/e2e/argilla.lock
$(LABEL_STUDIO)/ready $(ARGILLA)/ready:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

demo: demo-short demo-word demo-json demo-loop ## the model learns: all of these; each rewrites its part of docs/demos.md and fails when a target is missed

demo-short: ## DPO from comparisons of its own answers: half as long on unseen prompts
demo-word: ## a word that it is to avoid, by DPO from pairs and by KTO from thumbs
demo-json: ## GRPO: valid JSON on unseen prompts
demo-loop: ## the loop closes by itself, from feedback to a promotion; with labels by coin it refuses
demo-short demo-word demo-json demo-loop: build $(VENV)/ready
	$(BIN) pull --data $(TEST_DATA)
	TIDEMILL_BIN=$(BIN) TIDEMILL_TEST_MODEL=$(TEST_MODEL) $(VENV)/bin/python tests/demos/run.py $(@:demo-%=%) \
		--folder $(CACHE)/demos/$(@:demo-%=%) --page docs/demos.md $(ARGS)

tour: build chromium ## types what README.md and docs/tour.md say, and writes into them what came of it (five minutes; port 8080)
	$(PYTHON) tests/tour.py $(BIN) README.md --folder $(CACHE)/tour
	$(PYTHON) tests/tour.py $(BIN) docs/tour.md --folder $(CACHE)/tour

bench: build ## ours beside llama.cpp, vLLM and OpenVINO on this machine; rewrites docs/benchmarks.md (about an hour)
	$(MAKE) -C loadtest/peers all

bench-store: build $(TEST_MODEL) ## how fast feedback is taken through HTTP: 1, 16 and 64 connections, and batches
	CARGO="$(CARGO)" tests/bench_feedback.sh $(BIN) $(TEST_MODEL)

bench-train: $(TEST_MODEL) ## DPO beside TRL + PEFT, and each trick undone; rewrites its part of docs/benchmarks.md (about half an hour)
	tests/oracle/run.sh --environment
	bench=$$($(CARGO) bench -p tidemill-rlhf --bench train --locked --no-run --message-format=json \
		| sed -n 's/.*"name":"train".*"executable":"\([^"]*\)".*/\1/p' | tail -1); \
	$(PYTHON) tests/bench_train.py "$$bench" $(TEST_MODEL) $(CACHE)/oracle-venv/bin/python --each $(ARGS)

bench-beside: build $(TEST_MODEL) ## what a fine-tuning job costs those who are served beside it; rewrites its part of docs/benchmarks.md
	$(CARGO) build --release --locked -p tidemill-loadtest
	$(PYTHON) tests/bench_beside.py $(BIN) $(dir $(BIN))tidemill-loadtest $(TEST_MODEL) $(ARGS)

gpu-build: $(GPU_NVRTC)/ready ## what `make gpu-check` needs, into .cache/gpu: build here, carry it to a machine with a card (GPU_ARCH=sm_90a: for such a card alone)
	rm -rf $(GPU) && mkdir -p $(GPU)
	$(CARGO) test --release --locked --no-run -p tidemill-kernels --test card -p tidemill-engine --test throughput --message-format=json \
		| sed -n 's/.*"name":"\(card\|throughput\)".*"executable":"\([^"]*\)".*/\1 \2/p' \
		| while read -r name program; do strip -o $(GPU)/$$name $$program; done
	LD_LIBRARY_PATH=$(GPU_NVRTC)/nvidia/cuda_nvrtc/lib $(GPU)/card images $(GPU)/images $(GPU_ARCH)
	@du -sh $(GPU)
	@echo "needs $$(uname -m), and glibc $$(grep -ahoE 'GLIBC_2\.[0-9]+' $(GPU)/card $(GPU)/throughput | sort -Vu | tail -1 | cut -d_ -f2) or later"

gpu-check: ## the card of this machine: the same numbers, how fast, beside what it could do (8 minutes; builds nothing, see docs/gpu.md)
	@test -x $(GPU)/card || { echo "nothing to run in $(GPU): make gpu-build on a machine with compilers, and carry that folder here"; exit 1; }
	PYTHON=$(PYTHON) tests/gpu/check.sh $(GPU) $(REPORT)

oracle: ## regenerate the expected values with transformers and torch
	tests/oracle/run.sh

clean: ## remove what was built and fetched for tests; data/ stays
	$(CARGO) clean
	rm -rf $(CACHE)
