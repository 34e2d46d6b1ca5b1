# Sourced by the benchmarks' scripts, with the repository as working directory. Builds the programs
# in benches/tools, the parent operator (release), the guests $guests and the control plane; sets
# $cache, $tools (where the programs are) and $parent.
# shellcheck shell=bash
cache=${XDG_CACHE_HOME:-$HOME/.cache}/wasm-operator
target=${CARGO_TARGET_DIR:-$cache/target}
tools=$cache/latency-target/release
parent=$target/release/wasm-operator

echo "bench: building the native operators, the benchmarks and the parent operator (release)" >&2
CARGO_TARGET_DIR=$cache/latency-target cargo build --quiet --release --locked --manifest-path benches/tools/Cargo.toml
CARGO_TARGET_DIR=$target cargo build --quiet --release --locked
# Go guests are made by the parent operator, which is not to be built a second time for that.
WASM_OPERATOR=$(realpath "$parent") guests/build.sh "${guests[@]:?}" >&2
tests/control-plane/control-plane build >/dev/null
