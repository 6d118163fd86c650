# Targets for users and developers. Each one first makes what it needs, and nothing is made twice.
#
# make setup            prepare .venv, install the Debian packages and build the native parts
# make demo             the main job, from a raw log to an answered query (DATA=PATH: on the Home Depot files there;
#                       KEEP=1: its servers and the search page go on running until Ctrl-C)
# make test             everything that CI checks, from an empty checkout on
# make test-fast        the Python tests that are not slow
# make test-distributed the long tests of clusters
# make test-long        other tests that take minutes: ThreadSanitizer, benchmarks in a quick form, tutorials, variants
# make test-tensorflow-serving  compare our model server with TensorFlow Serving's (TENSORFLOW_MODEL_SERVER=PATH;
#                       SERVABLE=BASE: on a servable of `dpsr export`, too)
# make test-cpp         the C++ unit tests
# make lint             ruff and mypy
# make sanitize         the C++ cores under AddressSanitizer and UndefinedBehaviorSanitizer
# make sanitize-thread  the C++ tests that share memory between threads, under ThreadSanitizer
# make fuzz             the libFuzzer targets of tokenizer, filters, proxy and model server (FUZZ_RUNS=1000000: inputs for each)
# make bazel-test       build and test the C++ cores and the op libraries with Bazel
# make bench-tokenizer  compare the tokenizer with others (DATA=PATH: on multicpr_ecom/ and homedepot/ there)
# make bench-store      compare the store with flat examples
# make bench-index      FAISS indices: build time, recall, latency (ITEMS=15000000; PEERS=1: usearch, hnswlib, ScaNN, too)
# make bench-servable   a fused servable, compared with bare FAISS and with two services; filters, heads
# make bench-training   compare training with a plain Estimator, torch and a loop in C++
# make bench-learned-index   compare an index learned with the model with others of its size (DATA=DIR OUT=DIR)
# make report           run the paper's experiments and write a report to report/ (QUICK=1: in minutes; OUT=DIR)
# make ablations        the same report with the ablations
# make docs             build the documentation site in build/site/, with all links checked
# make wheel            build the wheel in dist/
# make sdist            build the source distribution in dist/
# make clean            delete everything that was built, except .venv

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
OUT ?=
KEEP ?=
TENSORFLOW_MODEL_SERVER ?=
SERVABLE ?=
FUZZ_RUNS ?= 1000000
ITEMS ?=
PEERS ?=

DEBIAN_PACKAGES := build-essential cmake ninja-build pkg-config libgrpc++-dev libgrpc-dev libprotobuf-dev protobuf-compiler \
	protobuf-compiler-grpc libnghttp2-dev libjemalloc-dev libutf8proc-dev libxxhash-dev libgtest-dev libssl-dev zlib1g-dev libboost1.74-dev \
	rapidjson-dev python3-dev python3-venv iproute2

# What tests call: openssl makes certificates, systemd-analyze checks the units, Chromium shows the search page, and an
# sshd of their own is what a cluster's hosts run.
TEST_PACKAGES := openssl systemd chromium chromium-driver openssh-server

FUZZ_TARGETS := $(addprefix tokenizer_cc/,tokenizer_fuzz tokenizer_config_fuzz vocabulary_fuzz) export/item_filter_fuzz serving/session_fuzz
SERVING_FUZZ_TARGETS := json_tensor_fuzz server_config_fuzz tensor_proto_fuzz

THREADED_TESTS := call_server_test change_log_test combined_searches_test embedding_test faiss_index_test filtered_search_test fresh_index_test item_filter_test product_quantizer_test rank_table_test tokenizer_test vocabulary_test worker_pool_test
empty :=
space := $(empty) $(empty)

.DELETE_ON_ERROR:
.PHONY: setup debian native demo test test-fast test-tools test-distributed test-long test-cpp test-beside test-python sanitize sanitize-build sanitize-cores sanitize-serving sanitize-thread fuzz bazel-test test-tensorflow-serving bench-tokenizer bench-store bench-index bench-servable bench-training bench-learned-index report ablations build/offline.bazelrc lint wheel clean

setup: native
	@$(MAKE) --no-print-directory build/nginx || echo "nginx is left out: benchmarks/proxy.py will not compare with it" >&2

# $(call install_debian,PACKAGES) installs the packages that are missing, as root or with sudo. If it can be neither, it
# prints the command that root has to run, and stops.
define install_debian
	@missing=$$(for p in $(1); do \
	  dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done | xargs); \
	[ -z "$$missing" ] && exit 0; \
	if [ $$(id -u) = 0 ]; then as_root=; elif sudo -n true 2>/dev/null; then as_root=sudo; else \
	  echo "These Debian packages are missing. Run this as root, then make again:" >&2; \
	  echo "  apt-get install -y --no-install-recommends $$missing" >&2; exit 1; fi; \
	echo "installing Debian packages: $$missing"; \
	$$as_root apt-get update -qq && \
	$$as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends $$missing >/dev/null
endef

debian:
	$(call install_debian,$(DEBIAN_PACKAGES))

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11 with venv, or give PYTHON=" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# Installs exactly the versions in constraints.txt, so that tomorrow's build is the same as today's. Python compiles the
# modules that it imports; to compile all of them takes 40 s of a core.
$(VENV)/.packages: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing Python packages"
	@$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt \
	  $$($(BIN)/python -c 'import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  e = p["optional-dependencies"]; print(*(d.replace(" ", "") for d in p["dependencies"] + e["train"] + e["report"] + e["gateway"] + e["dns"] + e["tracing"] + e["tune"] + e["spark"] + e["faiss-cpu"] + e["peers"] + e["dev"]))')
	@touch $@

# Makes .venv use the packages of this checkout. An egg-info that an older `make wheel` left here would hide new commands.
$(VENV)/.installed: $(VENV)/.packages setup.py | debian
	@echo "building the native parts and installing the packages in place"
	@rm -rf dpsr.egg-info
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# Runs every time: Ninja finds out what has changed.
native: $(VENV)/.installed
	@$(BIN)/python setup.py -q build_ext --inplace

demo: native
	@$(BIN)/dpsr demo $(if $(DATA),--data=$(DATA)) $(if $(OUT),--out=$(OUT)) $(if $(KEEP),--keep)

lint: native
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-cpp: native
	@ctest --test-dir build/current --output-on-failure --parallel 2

sanitize: sanitize-cores sanitize-serving

# Compiles the C++ cores, which need neither TensorFlow nor Python, with AddressSanitizer and UndefinedBehaviorSanitizer.
# Only their tests need FAISS, so this can run while pip installs it. `nice`, because pip then works on one processor
# alone. Prints errors only, because `make test` runs it beside other targets.
sanitize-build: debian | $(BIN)/python
	@cmake -S . -B build/sanitize -G Ninja -DDPSR_CORE_ONLY=ON -DDPSR_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=Debug \
	  -DDPSR_FAISS_LIBRARY=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/faiss/libfaiss.so >/dev/null
	@nice cmake --build build/sanitize -- --quiet

sanitize-cores: sanitize-build native
	@ASAN_OPTIONS=detect_leaks=0 ctest --test-dir build/sanitize --output-on-failure --parallel 2

# Tests the parts of the model server that read clients' bytes, with a short run of their fuzz targets.
sanitize-serving: native
	@cmake --build build/current --target serving_sanitized_tests
	@ctest --test-dir build/current -C sanitized -L sanitized --output-on-failure --parallel 2

# Tests the C++ code that threads share under ThreadSanitizer. FAISS is not built with it, so each call of FAISS runs on
# one thread. Only the tests run whose names say that threads share something.
sanitize-thread: native
	@cmake -S . -B build/sanitize-thread -G Ninja -DDPSR_CORE_ONLY=ON -DDPSR_SANITIZE=thread -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1 \
	  -DDPSR_FAISS_LIBRARY=$$($(BIN)/python -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("faiss").origin))')/libfaiss.so >/dev/null
	@cmake --build build/sanitize-thread --target $(THREADED_TESTS)
	@OMP_NUM_THREADS=1 GTEST_FILTER="*Thread*:*WorkerPool*:CallServerTest*" \
	  ctest --test-dir build/sanitize-thread --output-on-failure --parallel 2 -R '^($(subst $(space),|,$(THREADED_TESTS)))$$'

# Fuzzes the tokenizer and its files, the filters, and what proxy and model server read, with both sanitizers. Leaks are not
# checked in the model server, because TensorFlow's libraries are not built with sanitizers. The corpus grows in
# build/fuzz/corpus; an input that fails is left in build/fuzz/.
fuzz: native
	$(call install_debian,clang-14 libclang-rt-14-dev)
	@cmake -S . -B build/fuzz -G Ninja -DCMAKE_C_COMPILER=clang-14 -DCMAKE_CXX_COMPILER=clang++-14 -DDPSR_CORE_ONLY=ON \
	  -DDPSR_FUZZ=ON -DDPSR_SANITIZE=address,undefined,fuzzer-no-link -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DDPSR_FAISS_LIBRARY=$$($(BIN)/python -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("faiss").origin))')/libfaiss.so >/dev/null
	@cmake --build build/fuzz --target $(notdir $(FUZZ_TARGETS))
	@$(BIN)/python tests/tokenizer_cc/golden.py build/fuzz/seeds
	@cp -r tests/export/fuzz_seeds/* tests/serving/fuzz_seeds/session_fuzz build/fuzz/seeds
	@for path in $(FUZZ_TARGETS); do target=$$(basename $$path); \
	  mkdir -p build/fuzz/corpus/$$target && echo "$$target: $(FUZZ_RUNS) runs" && \
	  build/fuzz/$$path -runs=$(FUZZ_RUNS) -seed=1 -timeout=10 -verbosity=0 -print_funcs=0 -print_final_stats=1 \
	    -artifact_prefix=build/fuzz/$$target- build/fuzz/corpus/$$target build/fuzz/seeds/$$target || exit 1; done
	@cmake -S . -B build/fuzz-serving -G Ninja -DCMAKE_C_COMPILER=clang-14 -DCMAKE_CXX_COMPILER=clang++-14 -DDPSR_FUZZ=ON \
	  -DDPSR_SANITIZE=address,undefined,fuzzer-no-link -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python >/dev/null
	@cmake --build build/fuzz-serving --target $(SERVING_FUZZ_TARGETS)
	@for target in $(SERVING_FUZZ_TARGETS); do \
	  mkdir -p build/fuzz/corpus/$$target && echo "$$target: $(FUZZ_RUNS) runs" && \
	  TF_CPP_MIN_LOG_LEVEL=3 ASAN_OPTIONS=detect_leaks=0 build/fuzz-serving/serving/$$target -runs=$(FUZZ_RUNS) -seed=1 \
	    -timeout=10 -verbosity=0 -print_funcs=0 -print_final_stats=1 -artifact_prefix=build/fuzz/$$target- \
	    build/fuzz/corpus/$$target tests/serving/fuzz_seeds/$$target || exit 1; done

build/offline.bazelrc: bazel/offline/bazelrc
	@mkdir -p build
	@sed 's|%workspace%|$(CURDIR)|' $< >$@

# Runs Debian's Bazel without network and without a server that stays behind. All its files are below build/.
bazel-test: debian $(VENV)/.packages build/offline.bazelrc
	$(call install_debian,bazel-bootstrap)
	@/usr/bin/bazel --batch --output_user_root=$(CURDIR)/build/bazel --host_jvm_args=-Xmx1g \
	  test --config=offline --repo_env=PYTHON_BIN_PATH=$(CURDIR)/$(BIN)/python --jobs=2 --noshow_progress //...

# Runs the tests in two processes, in the order of tests/conftest.py: the fast tests first, so that most failures show
# early. All fast tests of a file run in the same process, and so do its slow ones. `python -m pytest` alone uses one
# process. Three processes were slower on 2 cores: not done after 12 minutes 40 seconds, against 11 minutes 50 in all.
# Threads of FAISS that wait sleep: two processes have twice as many threads as there are cores.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# $(call take_program,PACKAGE,FILE) takes one program out of Debian's package, which is not installed, because it would
# also start a server. A program of that name that is on the PATH is used instead.
define take_program
	@mkdir -p build/debian_$(1)
	@name=$(notdir $(2)); if command -v $$name >/dev/null; then ln -sf "$$(command -v $$name)" $@; exit 0; fi; \
	echo "downloading $$name"; \
	download() { (cd build/debian_$(1) && apt-get -o APT::Sandbox::User=root -qq download $(1)); }; \
	if ! download 2>/dev/null; then \
	  if [ $$(id -u) = 0 ]; then apt-get update -qq; elif sudo -n true 2>/dev/null; then sudo apt-get update -qq; fi; \
	  download || { echo "$$name is missing: install it, or run apt-get update as root; then make again" >&2; exit 1; }; \
	fi; \
	dpkg --fsys-tarfile build/debian_$(1)/$(1)_*.deb | tar -xOf - ./$(2) >$@ && chmod +x $@
	@rm -rf build/debian_$(1)
endef

# promtool checks the alert rules. Only one apt-get may run at a time.
build/promtool: | debian
	$(call take_program,prometheus,usr/bin/promtool)

# benchmarks/proxy.py compares the proxy with nginx.
build/nginx:
	$(call take_program,nginx,usr/sbin/nginx)

# Spark's tests need Java. A Java that is on the PATH is used.
test-tools: build/promtool
	$(call install_debian,$(TEST_PACKAGES) $(if $(shell command -v java 2>/dev/null),,openjdk-17-jre-headless))

test-fast: native test-tools
	$(PYTEST) -m "not slow and not distributed and not long"

# The Python tests leave processors idle while they wait for servers, and so does pip. The C++ tests are compiled and run
# with low priority beside both; their output follows when they have ended. None of them may build in build/current (-o),
# because Python tests build there, too, and only one may at a time.
test:
	@$(MAKE) --no-print-directory -j4 test-beside test-python

test-python: lint sanitize-serving test-tools
	MAKEFLAGS= $(PYTEST) -m "not distributed and not long"

test-beside: native sanitize-build
	@nice $(MAKE) --no-print-directory -j1 -o native -o sanitize-build sanitize-cores test-cpp \
	  >build/test_beside.log 2>&1; \
	status=$$?; cat build/test_beside.log; exit $$status

# Kills and stops processes of clusters, and compares them with local training. Takes minutes.
test-distributed: native
	$(BIN)/python -m pytest -m distributed

# ThreadSanitizer, whole benchmarks in a quick form, the tutorial, the demo on a real log, further variants of long tests.
test-long: sanitize-thread
	$(BIN)/python -m pytest -m long

# Sends the same requests to our model server and to TensorFlow Serving's.
test-tensorflow-serving: native
	@TENSORFLOW_MODEL_SERVER=$(TENSORFLOW_MODEL_SERVER) SERVABLE=$(SERVABLE) \
	  $(BIN)/python -m pytest tests/serving/compare_tensorflow_serving.py

# Installs the packages that the benchmarks compare with.
$(VENV)/.bench: $(VENV)/.packages
	@echo "installing the packages that the benchmarks compare with"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	  $$($(BIN)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"])')
	@touch $@

bench-tokenizer: native $(VENV)/.bench
	@$(BIN)/python benchmarks/tokenizer.py --json $(if $(DATA),--data=$(DATA))

bench-store: native
	@$(BIN)/python benchmarks/store.py --json

bench-index: native $(if $(PEERS),$(VENV)/.bench)
	@$(BIN)/python benchmarks/index.py --json $(if $(ITEMS),--items=$(ITEMS)) $(if $(PEERS),--peers)

bench-servable: native
	@$(BIN)/python benchmarks/servable.py --json $(if $(ITEMS),--items=$(ITEMS))

bench-training: native $(VENV)/.bench
	@$(BIN)/python benchmarks/training.py --json

bench-learned-index: native $(VENV)/.bench
	@$(BIN)/python benchmarks/learned_index.py --json $(if $(DATA),--data=$(DATA)) $(if $(OUT),--out=$(OUT))

report: native
	@$(BIN)/dpsr report --out=$(or $(OUT),report) $(if $(QUICK),--quick)

ablations: native
	@$(BIN)/dpsr report --out=$(or $(OUT),report) $(if $(QUICK),--quick) --ablations

# Installs what builds the documentation site.
$(VENV)/.docs: $(VENV)/.packages
	@echo "installing the packages that build the documentation site"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	  $$($(BIN)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

.PHONY: docs sdist
# A broken link, a heading that a link names and no page has, or a page that the navigation lacks is an error.
docs: native $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html; for its search: $(PYTHON) -m http.server --directory build/site"

wheel: native
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

sdist: $(VENV)/.packages
	@rm -rf dpsr.egg-info
	@$(BIN)/python setup.py -q sdist --dist-dir dist
	@rm -rf dpsr.egg-info

clean:
	rm -rf build dist demo *.egg-info
	find . -path ./$(VENV) -prune -o \( -name '*.so' -o -name '*.desc' \) -print -delete
	rm -rf serving/dpsr_serving/bin
