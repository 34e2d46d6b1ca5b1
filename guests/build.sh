#!/usr/bin/env bash
# build.sh [NAME...]: builds child operators (all of them without a name) and leaves each as
# out/NAME.wasm.
set -euo pipefail
cd "$(dirname "$0")"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/wasm-operator

# Go programs on controller-runtime: module and package of each.
declare -A go_operators=([go-ring]="go-ring ." [go-probe]="go-ring ./probe")

names=("$@")
if [ $# -eq 0 ]; then
  for main in */src/main.rs; do
    name=${main%%/*}
    [ "$name" = template ] || names+=("$name")
  done
  names+=(go-thin "${!go_operators[@]}")
fi
rust=() go=()
for name in "${names[@]}"; do
  if [ -f "$name/src/main.rs" ] && [ "$name" != template ]; then
    rust+=("$name")
  elif [ "$name" = go-thin ] || [ -n "${go_operators[$name]-}" ]; then
    go+=("$name")
  else
    echo "guests: there is no guests/$name; to make one: just new-guest $name" >&2
    exit 1
  fi
done
mkdir -p out

# install FILE NAME: a copy beside its place and a rename, since a parent may be reading the old one.
install() {
  cp "$1" "out/.$2.$$.wasm"
  mv "out/.$2.$$.wasm" "out/$2.wasm"
  say "$2"
}

say() {
  printf 'guests: %5d KiB  guests/out/%s.wasm\n' $(($(stat -c %s "out/$1.wasm") / 1024)) "$1"
}

if [ ${#rust[@]} -gt 0 ]; then
  ./prepare.sh
  # A lock file that was made without the patches keeps the originals, of which cargo only warns.
  if grep -q '^\[\[patch\.unused\]\]' Cargo.lock; then
    echo "guests: a patch of guests/Cargo.toml is not in use; try: cargo update" >&2
    sed -n '/^\[\[patch\.unused\]\]/,$ s/^name = /guests: not in use: /p' Cargo.lock >&2
    exit 1
  fi
  target=${GUESTS_TARGET_DIR:-$cache/guests-target}
  echo "guests: building ${rust[*]} (a minute or two the first time)"
  CARGO_TARGET_DIR=$target cargo build --quiet --release --locked "${rust[@]/#/--package=}"
  for name in "${rust[@]}"; do
    install "$target/wasm32-wasip1/release/$name.wasm" "$name"
  done
fi

for name in "${go[@]}"; do
  command -v go >/dev/null || { echo "guests: go is missing: $name needs Go 1.26 or later, see https://go.dev/doc/install" >&2; exit 1; }
  if [ "$name" = go-thin ]; then
    echo "guests: building go-thin"
    thin=$(mktemp)
    (cd go-thin && GOOS=wasip1 GOARCH=wasm go build -trimpath -buildvcs=false -buildmode=c-shared -ldflags='-s -w -buildid=' -o "$thin" .)
    install "$thin" "$name"
    rm "$thin"
    continue
  fi
  # By the program itself, as its users do.
  if [ -z "${parent-}" ]; then
    echo "guests: building the parent operator, whose build-go makes $name (some minutes the first time)"
    export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$cache/target}
    (cd .. && cargo build --quiet --locked)
    parent=$CARGO_TARGET_DIR/debug/wasm-operator
  fi
  read -r module package <<<"${go_operators[$name]}"
  "$parent" build-go "$module" "$package" -o "out/$name.wasm"
  say "$name"
done
