#!/usr/bin/env bash
# build.sh [NAME...]: builds child operators (all of them without a name) and leaves each as
# out/NAME.wasm.
set -euo pipefail
cd "$(dirname "$0")"
./prepare.sh

# A lock file that was made without the patches keeps the originals, of which cargo only warns.
if grep -q '^\[\[patch\.unused\]\]' Cargo.lock; then
  echo "guests: a patch of guests/Cargo.toml is not in use; try: cargo update" >&2
  sed -n '/^\[\[patch\.unused\]\]/,$ s/^name = /guests: not in use: /p' Cargo.lock >&2
  exit 1
fi

names=("$@")
if [ $# -eq 0 ]; then
  for main in */src/main.rs; do
    name=${main%%/*}
    [ "$name" = template ] || names+=("$name")
  done
fi
for name in "${names[@]}"; do
  if ! [ -f "$name/src/main.rs" ] || [ "$name" = template ]; then
    echo "guests: there is no guests/$name; to make one: just new-guest $name" >&2
    exit 1
  fi
done

export CARGO_TARGET_DIR=${GUESTS_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/wasm-operator/guests-target}
echo "guests: building ${names[*]} (a minute or two the first time)"
cargo build --quiet --release --locked "${names[@]/#/--package=}"

mkdir -p out
for name in "${names[@]}"; do
  # A copy beside its place and a rename: a parent may be reading the old one.
  cp "$CARGO_TARGET_DIR/wasm32-wasip1/release/$name.wasm" "out/.$name.$$.wasm"
  mv "out/.$name.$$.wasm" "out/$name.wasm"
  printf 'guests: %4d KiB  guests/out/%s.wasm\n' $(($(stat -c %s "out/$name.wasm") / 1024)) "$name"
done
