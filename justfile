# The front door. `just` lists what there is; everything that is missing and can
# be had is installed or built by the recipe that needs it, outside the checkout.

set shell := ["bash", "-euo", "pipefail", "-c"]
set positional-arguments

cache := env("XDG_CACHE_HOME", home_directory() / ".cache") / "wasm-operator"
control_plane := justfile_directory() / "tests/control-plane/control-plane"

export CARGO_TARGET_DIR := env("CARGO_TARGET_DIR", cache / "target")

# List the recipes
_default:
    @just --justfile '{{ justfile() }}' --list --unsorted

# demo.sh ends well after Ctrl-C; with [continue] so does `just demo`.

# Watch three kinds of child operators at work, until Ctrl-C: [--once] [--context NAME]
[continue]
[no-exit-message]
demo *ARGS: _need
    @yaml/demo/demo.sh "$@"

# Run all tests: [--context NAME] [ARGUMENTS OF cargo test]
test *ARGS: _need
    #!/usr/bin/env bash
    set -euo pipefail
    # A cluster that the user has is used only when it is asked for by name.
    if [ "${1:-}" = --context ]; then
        export WASM_OPERATOR_TEST_CONTEXT=${2:?--context needs a name}
        shift 2
    else
        unset KUBECONFIG WASM_OPERATOR_TEST_CONTEXT
    fi
    '{{ control_plane }}' build >/dev/null
    guests/build.sh
    echo "test: the control plane's own tests"
    (cd tests/control-plane && go test .)
    echo "test: the Go support package's own tests"
    (cd guests/go && go test .)
    echo "test: building the parent operator and its tests (some minutes the first time)"
    cargo test --locked "$@"

# Run the examples of controller-runtime and client-go as children, and look at what they do
test-go-operators: _need
    '{{ control_plane }}' build >/dev/null
    tests/go-examples.sh
    unset KUBECONFIG WASM_OPERATOR_TEST_CONTEXT; cargo test --locked --test go_examples -- --ignored

# Build child operators to guests/out/NAME.wasm; all of them without a name
build-guests *NAMES: _need
    @guests/build.sh "$@"

# Make a new child operator, guests/NAME
new-guest NAME:
    @guests/new-guest.sh "$@"

# Build the parent operator as it is released
build: _need
    cargo build --release --locked

# Build the static image with the demo's children and run it in a kind cluster: [CLUSTER]
kind-deploy CLUSTER="kind": _need
    #!/usr/bin/env bash
    set -euo pipefail
    for tool in docker kind kubectl; do
        command -v $tool >/dev/null || { echo "$tool is missing: kind-deploy builds an image with docker and loads it into a kind cluster" >&2; exit 1; }
    done
    kind get clusters | grep -qxF "$1" || kind create cluster --name "$1"
    kubectl=(kubectl --context "kind-$1")
    guests/build.sh simple ring comb
    docker build --file Dockerfile.musl --target demo --tag wasm-operator-demo:dev .
    kind load docker-image --name "$1" wasm-operator-demo:dev
    "${kubectl[@]}" apply -f yaml/crd.yaml -f yaml/demo/namespaces.yaml -f yaml/rbac.yaml -f yaml/kind/deployment.yaml
    "${kubectl[@]}" wait --for=condition=Established --timeout=30s -f yaml/crd.yaml
    "${kubectl[@]}" rollout restart -n wasm-operator deployment/wasm-operator
    "${kubectl[@]}" rollout status -n wasm-operator deployment/wasm-operator
    "${kubectl[@]}" apply -f yaml/demo/testresource.yaml
    echo "kind-deploy: kubectl --context kind-$1 logs -n wasm-operator deployment/wasm-operator --follow"

# Measure reconcile latency of a child against the same source built natively
bench *ARGS: _need
    @benches/ring-latency.sh "$@"

# Measure memory: children loaded, idle and hibernated, native processes, one combined: [--full] [--children N]
bench-memory *ARGS: _need
    @benches/memory.sh "$@"

# Measure how long children take to hibernate and to wake, and a ring of sleeping ones: [--wakes N] [--rounds N]
bench-wake *ARGS: _need
    @benches/wake.sh "$@"

# Measure Go operators as children against native processes: [--full] [--parts memory,wake,cpu,idle]
bench-go *ARGS: _need
    @benches/go.sh "$@"

# Measure how well wake-ups are foretold
bench-prediction: _need
    cargo bench --quiet --locked --bench prediction

# Measure what the checks cost by which guests are stopped: [RUNS]
bench-checks *ARGS: _need
    @benches/checks.sh "$@"

# Start or stop a control plane that stays: [up|down]
control-plane ACTION="up":
    #!/usr/bin/env bash
    set -euo pipefail
    state='{{ cache / "cluster" }}'
    case $1 in
    up)
        kubeconfig=$('{{ control_plane }}' up "$state")
        kubectl=$('{{ control_plane }}' path kubectl)
        echo "# a kubectl of the same version: $kubectl"
        echo "export KUBECONFIG=$kubeconfig"
        ;;
    down) '{{ control_plane }}' down "$state" --purge ;;
    *) echo "usage: just control-plane [up|down]" >&2; exit 64 ;;
    esac

# Format everything
fmt: _need-rustfmt
    cargo fmt
    cd guests && cargo fmt
    gofmt -w tests/control-plane guests

# Check formats and run the linters
lint: _need _need-rustfmt _need-clippy
    #!/usr/bin/env bash
    set -euo pipefail
    step() { echo "lint: $*"; }
    step formats
    cargo fmt --check
    (cd guests && cargo fmt --check)
    unformatted=$(gofmt -l tests/control-plane guests)
    [ -z "$unformatted" ] || { echo "lint: not formatted: $unformatted" >&2; exit 1; }
    step shell scripts
    mapfile -t scripts < <(git ls-files -z | xargs -0 grep -lE '^#!.*\b(ba)?sh$' --)
    for script in "${scripts[@]}"; do bash -n "$script"; done
    if command -v shellcheck >/dev/null; then shellcheck "${scripts[@]}"; fi
    step control plane
    (cd tests/control-plane && GOFLAGS=-mod=readonly go vet .)
    step Go guests
    for module in go go-ring; do (cd "guests/$module" && GOFLAGS=-mod=readonly go vet ./...); done
    for module in go go-thin; do (cd "guests/$module" && GOOS=wasip1 GOARCH=wasm go vet ./...); done
    step parent operator
    cargo clippy --quiet --locked --all-targets -- -D warnings
    step benchmarks
    (cd benches/tools && cargo fmt --check && CARGO_TARGET_DIR='{{ cache / "latency-target" }}' cargo clippy --quiet --locked --release --all-targets -- -D warnings)
    step child operators
    guests/prepare.sh
    cd guests
    CARGO_TARGET_DIR='{{ cache / "guests-target" }}' cargo clippy --quiet --locked --release -- -D warnings

# What cannot be installed from here; Go is checked by the control plane, which says the version.
_need:
    @command -v cargo >/dev/null || { echo "cargo is missing: install Rust with rustup" >&2; exit 1; }
    @command -v cc >/dev/null || { echo "a C compiler is missing: install gcc and libc6-dev, or the like" >&2; exit 1; }
    @command -v git >/dev/null || { echo "git is missing: install git" >&2; exit 1; }

_need-rustfmt: (_component "fmt" "rustfmt")
_need-clippy: (_component "clippy" "clippy")

# A component of the Rust toolchain, installed when it is missing
_component SUBCOMMAND NAME:
    @cargo "$1" --version >/dev/null 2>&1 || { echo "installing $2"; rustup --quiet component add "$2"; } || { echo "$2 is missing: try rustup component add $2" >&2; exit 1; }
