#!/usr/bin/env bash
# build.sh [NAME...]: builds child operators (all of them without a name) and leaves each as
# out/NAME.wasm. $WASM_OPERATOR is the parent operator that makes Go ones; without it, it is built.
set -euo pipefail
cd "$(dirname "$0")"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/wasm-operator

# Go programs on controller-runtime: module and package of each.
declare -A go_operators=([go-ring]="go-ring ." [go-probe]="go-ring ./probe")

names=("$@")
if [ $# -eq 0 ]; then
  for main in */src/main.rs */*.c; do
    name=${main%%/*}
    [ "$name" = template ] || names+=("$name")
  done
  names+=(go-thin "${!go_operators[@]}")
fi
rust=() c=() go=()
for name in "${names[@]}"; do
  if [ -f "$name/$name.c" ]; then
    c+=("$name")
  elif [ -f "$name/src/main.rs" ] && [ "$name" != template ]; then
    rust+=("$name")
  elif [ "$name" = go-thin ] || [ -n "${go_operators[$name]-}" ]; then
    go+=("$name")
  else
    echo "guests: there is no guests/$name; to make one: just new-guest $name" >&2
    exit 1
  fi
done
mkdir -p out
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# leave NAME FILE: by a copy beside its place and a rename, as a parent may be reading the old one.
leave() {
  cp "$2" "out/.$1.$$.wasm"
  mv "out/.$1.$$.wasm" "out/$1.wasm"
  printf 'guests: %5d KiB  guests/out/%s.wasm\n' $(($(stat -c %s "out/$1.wasm") / 1024)) "$1"
}

# A reactor, since nothing is to be done before the first event. With the stack below the data its
# overflow is a trap; the printf without floating point is the smaller one.
compile_c() {
  clang --target=wasm32-wasi -mexec-model=reactor -std=c17 -Os -flto -Wall -Wextra -Wconversion \
    -Wl,--gc-sections,--strip-all,--stack-first "$@" -lc-printscan-no-floating-point
}
c_compiles() { compile_c -o "$scratch/probe.wasm" -x c - <<<'#include <stdio.h>' 2>/dev/null; }

build_c() {
  local name packages=(clang lld wasi-libc libclang-rt-dev-wasm32)
  # Only who asks for all of them has not asked for C.
  if ! c_compiles && [ "$1" = all ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "guests: installing ${packages[*]} by apt-get, for ${c[*]}"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
      apt-get install -qq --no-install-recommends "${packages[@]}"; } >/dev/null 2>&1 || true
  fi
  if ! c_compiles; then
    local remedy="C needs a clang for WebAssembly: apt-get install ${packages[*]}, or the like"
    if [ "$1" = all ]; then
      echo "guests: skipping ${c[*]}; $remedy" >&2
      return
    fi
    echo "guests: cannot build ${c[*]}; $remedy" >&2
    exit 1
  fi
  for name in "${c[@]}"; do
    compile_c -o "$scratch/$name.wasm" "$name/$name.c"
    leave "$name" "$scratch/$name.wasm"
  done
}

build_rust() {
  local name target=${GUESTS_TARGET_DIR:-$cache/guests-target}
  ./prepare.sh
  # A lock file that was made without the patches keeps the originals, of which cargo only warns.
  if grep -q '^\[\[patch\.unused\]\]' Cargo.lock; then
    echo "guests: a patch of guests/Cargo.toml is not in use; try: cargo update" >&2
    sed -n '/^\[\[patch\.unused\]\]/,$ s/^name = /guests: not in use: /p' Cargo.lock >&2
    exit 1
  fi
  echo "guests: building ${rust[*]} (a minute or two the first time)"
  CARGO_TARGET_DIR=$target cargo build --quiet --release --locked "${rust[@]/#/--package=}"
  for name in "${rust[@]}"; do
    leave "$name" "$target/wasm32-wasip1/release/$name.wasm"
  done
}

build_go() {
  local name module package parent=${WASM_OPERATOR-}
  command -v go >/dev/null || {
    echo "guests: go is missing: ${go[*]} need Go 1.26 or later, see https://go.dev/doc/install" >&2
    exit 1
  }
  for name in "${go[@]}"; do
    if [ "$name" = go-thin ]; then
      echo "guests: building go-thin"
      (cd go-thin && GOOS=wasip1 GOARCH=wasm go build -trimpath -buildvcs=false \
        -buildmode=c-shared -ldflags='-s -w -buildid=' -o "$scratch/go-thin.wasm" .)
      leave go-thin "$scratch/go-thin.wasm"
      continue
    fi
    # By the program itself, as its users do.
    if [ -z "$parent" ]; then
      echo "guests: building the parent operator, whose build-go makes $name (some minutes the first time)"
      export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$cache/target}
      # Elsewhere, this folder's cargo settings are not in use.
      (cd .. && cargo build --quiet --locked)
      parent=$CARGO_TARGET_DIR/debug/wasm-operator
    fi
    read -r module package <<<"${go_operators[$name]}"
    "$parent" build-go "$module" "$package" -o "$scratch/$name.wasm"
    leave "$name" "$scratch/$name.wasm"
  done
}

[ ${#rust[@]} -eq 0 ] || build_rust
[ ${#c[@]} -eq 0 ] || build_c "$([ $# -gt 0 ] || echo all)"
[ ${#go[@]} -eq 0 ] || build_go
