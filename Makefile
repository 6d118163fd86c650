# make setup   prepares .venv, Debian packages and the native parts
# make demo    runs the main job (DATA=PATH: on the Home Depot files there)
# make test    everything that CI checks, from nothing
#
# Each target does what it needs first, and nothing twice.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
OUT ?=

DEBIAN_PACKAGES := build-essential cmake ninja-build pkg-config libgrpc++-dev libgrpc-dev protobuf-compiler \
	protobuf-compiler-grpc libutf8proc-dev libxxhash-dev libgtest-dev libssl-dev zlib1g-dev python3-dev python3-venv

.DELETE_ON_ERROR:
.PHONY: setup debian native demo test test-fast test-cpp sanitize lint wheel clean

setup: native

# Installs what is missing as root or through sudo; otherwise prints the one line to run, and stops.
debian:
	@missing=$$(for p in $(DEBIAN_PACKAGES); do \
	  dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done | xargs); \
	[ -z "$$missing" ] && exit 0; \
	if [ $$(id -u) = 0 ]; then as_root=; elif sudo -n true 2>/dev/null; then as_root=sudo; else \
	  echo "These Debian packages are missing. Run this as root, then make again:" >&2; \
	  echo "  apt-get install -y --no-install-recommends $$missing" >&2; exit 1; fi; \
	echo "installing Debian packages: $$missing"; \
	$$as_root apt-get update -qq && \
	$$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null

# Exactly the versions of constraints.txt, so that a build of today is a build of tomorrow.
$(VENV)/.packages: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11 with venv, or give PYTHON=" >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "installing Python packages"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	  $$($(BIN)/python -c 'import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  e = p["optional-dependencies"]; print(*(d.replace(" ", "") for d in p["dependencies"] + e["train"] + e["faiss-cpu"] + e["dev"]))')
	@touch $@

# Points .venv at this checkout; the native parts are built by the next rule.
$(VENV)/.installed: $(VENV)/.packages setup.py | debian
	@echo "building the native parts and installing the packages in place"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# Ninja finds out by itself what has changed.
native: $(VENV)/.installed
	@$(BIN)/python setup.py -q build_ext --inplace

demo: native
	@$(BIN)/dpsr demo $(if $(DATA),--data=$(DATA)) $(if $(OUT),--out=$(OUT))

lint: native
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-cpp: native
	@ctest --test-dir build/current --output-on-failure --parallel 2

# The C++ cores, which need neither TensorFlow nor Python, under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: native
	@cmake -S . -B build/sanitize -G Ninja -DDPSR_CORE_ONLY=ON -DDPSR_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=Debug \
	  -DDPSR_FAISS_LIBRARY=$$($(BIN)/python -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("faiss").origin))')/libfaiss.so >/dev/null
	@cmake --build build/sanitize
	@ASAN_OPTIONS=detect_leaks=0 ctest --test-dir build/sanitize --output-on-failure --parallel 2

test-fast: native
	$(BIN)/python -m pytest -m "not slow"

# The fast part first: what is wrong shows early.
test: lint test-cpp sanitize
	$(BIN)/python -m pytest -m "not slow"
	$(BIN)/python -m pytest -m slow

wheel: native
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

clean:
	rm -rf build dist demo *.egg-info
	find . -path ./$(VENV) -prune -o \( -name '*.so' -o -name '*.desc' \) -print -delete
	rm -rf serving/dpsr_serving/bin
