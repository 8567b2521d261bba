# Targets for users and developers. `make demo` installs the build dependencies, builds, and runs the demonstration.

CARGO ?= cargo
PYTHON ?= python3
.DELETE_ON_ERROR:
BIN := target/release/bloomcast
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# Build and test dependencies on Debian and Raspberry Pi OS: a linker, libclang for the camera bindings, a broker and its clients
# for the tests, and openssl, with which a test reads the keys.
PACKAGES := build-essential pkg-config libclang-dev mosquitto mosquitto-clients openssl

# Installs the missing packages of a list; twice, since a package may replace another of the list that comes from backports.
install = for attempt in 1 2; do missing=; for package in $(1); do \
	  dpkg-query -W -f='$${db:Status-Status}\n' $$package 2>/dev/null | grep -qx installed || missing="$$missing $$package"; done; \
	[ -z "$$missing" ] || { echo "installing$$missing"; $(SUDO) apt-get update -qq && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; } || exit; done

# Runs tests; fails if none ran, as after the name of one has changed.
run_tests = @mkdir -p target; { $(1) 2>&1; echo $$? >target/test-status; } | tee target/test-log; \
	grep -q '^test result: ok\. [1-9]' target/test-log || { echo "error: no test passed"; exit 1; }; exit "$$(cat target/test-status)"

# $(call venv,FOLDER,PACKAGES): installs Python packages into a virtual environment, again if that was interrupted.
venv = @[ -e $(1)/installed ] || { mkdir -p $(1) && $(PYTHON) -m venv $(1) && \
	$(1)/bin/pip install --quiet --disable-pip-version-check $(2) && touch $(1)/installed; }

.PHONY: all setup debian nightly python photographs build demo bench garden peers instructions model backbones backbones-keras clean
.PHONY: test test-backbones test-backbones-keras test-tensorboard sanitize lint licences doc fuzz
.PHONY: deb deb-arm64 deb-armhf deb-check arm64 armhf arm64-smoke armhf-smoke vm-disk vm-test

all: build

# Installs missing packages.
setup:
	@command -v $(CARGO) >/dev/null || { echo "error: cargo is missing; install Rust from https://rustup.rs" >&2; exit 1; }
	@command -v dpkg-query >/dev/null || { echo "setup: not a Debian system: install these packages yourself: $(PACKAGES)"; exit 0; }; \
	$(call install,$(PACKAGES))

# Prerequisites that no target can install; checked before anything is built.
debian:
	@command -v apt-get >/dev/null || { echo "error: this target installs Debian's packages; apt-get is missing" >&2; exit 1; }
nightly:
	@$(CARGO) +nightly --version >/dev/null 2>&1 || { echo "error: a nightly compiler is missing: rustup toolchain install nightly" >&2; exit 1; }
python:
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: Python's venv module is missing (Debian's package python3-venv)" >&2; exit 1; }
photographs:
	@[ -d ../shared/flowers/train ] && [ -d ../shared/flowers/val ] || \
	  { echo "error: ../shared/flowers/train and ../shared/flowers/val are missing: photographs, a folder for each class" >&2; exit 1; }

build: setup
	@[ -x $(BIN) ] || echo "building; the first time this takes six to ten minutes on two cores"
	$(CARGO) build --release --locked

# Replays photographs if there are some, else trains on drawings and replays those.
demo: build
	@$(BIN) demo

# Unit tests and whole-program tests. A test without photographs prints `skipped:`, one with photographs how many it has seen. Fails
# if there are photographs and no test has seen one. Tests that need other tools have targets of their own: test-backbones,
# test-backbones-keras, test-tensorboard, arm64-smoke, armhf-smoke, vm-test.
test: setup
	@mkdir -p target; \
	{ $(CARGO) test --release --locked --workspace --no-fail-fast 2>&1; echo $$? >target/test-status; } | tee target/test-log; \
	awk -v expected="$(wildcard ../shared/flowers/val)" \
	  '/^test result: / { passed += $$4; failed += $$6 } /^skipped: / { name = $$2; sub(/:$$/, "", name); skipped[name] } \
	  /^photographs: / { tests++; seen += $$3 } \
	  END { printf "photographs: %d tests saw %d\n%d passed, %d failed, %d skipped\n", tests, seen, passed - length(skipped), failed, length(skipped); \
	  if (expected && !seen && !failed) { print "error: no test saw the photographs in " expected; exit 1 } }' target/test-log && \
	exit "$$(cat target/test-status)"

# The tests of other backbones than the built-in one.
test-backbones: setup backbones
	$(call run_tests,$(CARGO) test --release --locked --test program -- --ignored backbones:: --skip keras)
test-backbones-keras: setup backbones-keras
	$(call run_tests,$(CARGO) test --release --locked --test program -- --ignored backbones::keras)

# Whether TensorBoard's own reader reads a run's event file; installs it into target/tensorboard.
test-tensorboard: python setup
	$(call venv,target/tensorboard,tensorboard==2.21.0)
	$(call run_tests,$(CARGO) test --release --locked --test program -- --ignored tensorboard::)

lint: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --release --locked --no-default-features -- -D warnings
	$(CARGO) clippy --release --locked --features cuda -- -D warnings

# The kernels' tests under AddressSanitizer. Needs a nightly compiler and compiles everything again.
sanitize: nightly setup
	RUSTFLAGS=-Zsanitizer=address $(CARGO) +nightly test --locked -p bloomcast-kernels --lib --tests --target $(HOST) --target-dir target/sanitized

# Checks the licences and sources of the dependencies (deny.toml).
licences: setup
	@command -v cargo-deny >/dev/null || $(CARGO) install --quiet --locked cargo-deny@0.20.2
	$(CARGO) deny check bans licenses sources

doc: setup
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --locked --workspace --no-deps --document-private-items

# Fuzzes the bundle reader for ten minutes, starting with the corpus of earlier runs (fuzz/corpus.tar.gz). Failing inputs are in
# fuzz/artifacts.
FUZZ_SECONDS ?= 600
fuzz: nightly setup
	@command -v cargo-fuzz >/dev/null || $(CARGO) install --quiet --locked cargo-fuzz@0.13.2
	@[ -d fuzz/corpus ] || { mkdir -p fuzz/corpus && tar -C fuzz/corpus -xzf fuzz/corpus.tar.gz; }
	$(CARGO) +nightly fuzz run --sanitizer none bundle -- -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=1024 -malloc_limit_mb=256

# ---- Packages, in target/debian.

# For this machine's architecture.
CARGO_DEB = command -v cargo-deb >/dev/null || $(CARGO) install --quiet --locked cargo-deb@3.8.0; $(BIN) manpages target/manpages
deb: debian build
	@$(CARGO_DEB)
	$(CARGO) deb --no-build --locked --strip --output target/debian/
	systemd/check-package target/debian/bloomcast_*_$$(dpkg --print-architecture).deb

# The same, with lintian and systemd's check of the unit.
deb-check: debian
	@$(call install,lintian systemd)
	$(MAKE) deb

deb-arm64 deb-armhf: deb-%: debian % build
	@$(CARGO_DEB)
	CARGO_TARGET_DIR=target/cross $(CARGO) deb --no-build --locked --strip --target $(TRIPLE_$*) --output target/debian/
	systemd/check-package target/debian/bloomcast_*_$*.deb

# ---- ARM, cross-compiled with Debian's compiler, without a container; Rust's standard library is compiled from Debian's sources,
# so that no foreign package lists are needed. `test` is in the list for the build as well: a different list would compile everything
# again for the tests. (With a container: `cross build --release --target $(TRIPLE_arm64)`.)
export CROSS_CONFIG := cross.toml
TRIPLE_arm64 := aarch64-unknown-linux-gnu
TRIPLE_armhf := armv7-unknown-linux-gnueabihf
GNU_arm64 := aarch64-linux-gnu
GNU_armhf := arm-linux-gnueabihf
EMULATOR_arm64 := qemu-aarch64-static -L /usr/$(GNU_arm64)
EMULATOR_armhf := qemu-arm-static -L /usr/$(GNU_armhf)
# The target triple in the spelling of Cargo's environment variables.
upper = $(shell echo $(subst -,_,$(TRIPLE_$(1))) | tr a-z A-Z)
# $(call for,arm64,build): runs a command of Debian's cargo for ARM.
for = RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=target/cross CARGO_TARGET_$(call upper,$(1))_LINKER=$(GNU_$(1))-gcc \
  CARGO_TARGET_$(call upper,$(1))_RUNNER="$(EMULATOR_$(1))" \
  BINDGEN_EXTRA_CLANG_ARGS_$(subst -,_,$(TRIPLE_$(1)))=-I/usr/$(GNU_$(1))/include \
  /usr/bin/cargo $(2) -Zbuild-std=std,test --release --locked --target $(TRIPLE_$(1))
arm64 armhf: debian setup
	@$(call install,rustc-web cargo-web rust-web-src gcc-$(GNU_$@) binutils-$(GNU_$@) libc6-dev-$@-cross)
	@echo "building for $(TRIPLE_$@)"
	$(call for,$@,build)

# Runs the ARM program in an emulator and compares its results with the native program's; runs the kernels' tests, which compare
# with a reference, on ARM, with overflow checks.
arm64-smoke armhf-smoke: %-smoke: debian % build
	@$(call install,qemu-user-static)
	$(call run_tests,$(call for,$*,test --config 'profile.release.package.bloomcast-kernels.overflow-checks=true' -p bloomcast-kernels --lib --tests))
	$(call run_tests,$(call for,$*,test --lib) vision::backbone::fusion)
	$(call run_tests,BLOOMCAST_FOREIGN="$(EMULATOR_$*) target/cross/$(TRIPLE_$*)/release/bloomcast" \
	  $(CARGO) test --release --locked --test program -- --ignored --nocapture foreign::)

vm-disk: debian setup
	@$(call install,qemu-system-arm qemu-utils qemu-user-static binfmt-support arch-test mmdebstrap e2fsprogs jq)
	@mkdir -p target/device
	$(SUDO) tests/device/root target/device

# System test on a virtual device: Debian for arm64 with systemd, mosquitto and a virtual camera, which shows photographs, or
# drawings where there are none. The package is installed with the commands of the README. The disk is created once, in
# target/device.
vm-test: vm-disk deb-arm64
	$(CARGO) build --release --locked --example yuyv --example draw_flowers
	tests/device/run target/device target/debian/bloomcast_*_arm64.deb

bench: setup
	$(CARGO) bench --locked

# Measures the built-in model before other flowers, other things, empty scenes and under the conditions of a camera; MODEL=FILE measures
# another one.
garden: photographs setup
	$(CARGO) bench --locked --bench garden -- $(if $(MODEL),--model $(abspath $(MODEL)))

# Compares the time of ONNX Runtime, LiteRT and bloomcast on the same network, in alternation; installs the former into target/peers.
peers: python build
	$(call venv,target/peers,-r benches/peers/requirements.txt)
	target/peers/bin/python benches/peers/run.py

# Counts the instructions of a frame with tract's operators and with each set of kernels, here and, in an emulator, on ARM.
FRAME ?= $(firstword $(wildcard ../shared/flowers/val/roses/*.jpg) docs/report.jpg)
instructions: debian arm64 build
	@$(call install,valgrind qemu-user)
	benches/instructions/run $(BIN) $(FRAME) target/cross/$(TRIPLE_arm64)/release/bloomcast /usr/$(GNU_arm64)

# Trains the built-in model again, with the default recipe. The second half of the other things, and six of the other species, are for
# measuring: `make garden`.
model: photographs build
	@rm -rf target/model && mkdir -p target/model/things
	@ls ../shared/others/*.jpg | LC_ALL=C sort | head -155 | while read -r file; do ln -s "$$(realpath "$$file")" target/model/things/; done
	$(BIN) train ../shared/flowers/train --val ../shared/flowers/val --also ../shared/garden/known_train \
	  --unknown ../shared/garden/other_train --unknown target/model --out runs/flowers --overwrite
	cp runs/flowers/model.bloom models/flowers.bloom

# Other backbones for the tests, in target/backbones: EfficientNet-Lite0 with its published weights, channels first and last,
# and ONNX's graph of ResNet50. `make backbones-keras` adds Keras's ResNet50, InceptionV3 and Xception (TensorFlow is a large
# download).
BACKBONES := target/backbones
backbones: $(addprefix $(BACKBONES)/,efficientnet_lite0.onnx efficientnet_lite0_channels_last.onnx light_resnet50.onnx)

$(BACKBONES)/venv/installed: models/requirements.txt | python
	@rm -f $@
	$(call venv,$(BACKBONES)/venv,-r models/requirements.txt)

$(BACKBONES)/efficientnet_lite0.onnx: models/build_efficientnet_lite0.py | $(BACKBONES)/venv/installed
	$(BACKBONES)/venv/bin/python models/build_efficientnet_lite0.py --out $@

$(BACKBONES)/efficientnet_lite0_channels_last.onnx: models/build_efficientnet_lite0.py | $(BACKBONES)/venv/installed
	$(BACKBONES)/venv/bin/python models/build_efficientnet_lite0.py --channels-last --out $@

$(BACKBONES)/light_resnet50.onnx: | $(BACKBONES)/venv/installed
	cp $$($(BACKBONES)/venv/bin/python -c 'import onnx, pathlib; print(pathlib.Path(onnx.__file__).parent)')/backend/test/data/light/light_resnet50.onnx $@

backbones-keras: | $(BACKBONES)/venv/installed
	$(BACKBONES)/venv/bin/pip install --quiet --disable-pip-version-check -r models/requirements-keras.txt
	$(BACKBONES)/venv/bin/python models/export_keras.py --out $(BACKBONES)

clean:
	$(CARGO) clean
