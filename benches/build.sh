# Sourced by the benchmarks' scripts, with the repository as working directory. Builds the guests
# $guests, the programs in benches/tools, the parent operator (release) and the control plane; sets
# $cache, $tools (where the programs are) and $parent.
# shellcheck shell=bash
cache=${XDG_CACHE_HOME:-$HOME/.cache}/wasm-operator
target=${CARGO_TARGET_DIR:-$cache/target}
tools=$cache/latency-target/release
parent=$target/release/wasm-operator

guests/build.sh "${guests[@]:?}" >&2
echo "bench: building the native operators, the benchmarks and the parent operator (release)" >&2
CARGO_TARGET_DIR=$cache/latency-target cargo build --quiet --release --locked --manifest-path benches/tools/Cargo.toml
CARGO_TARGET_DIR=$target cargo build --quiet --release --locked
tests/control-plane/control-plane build >/dev/null
