#!/usr/bin/env bash
# build.sh [NAME...]: builds child operators (all of them without a name) and leaves each as
# out/NAME.wasm.
set -euo pipefail
cd "$(dirname "$0")"
./prepare.sh
export CARGO_TARGET_DIR=${GUESTS_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/wasm-operator/guests-target}
packages=()
for name in "$@"; do packages+=(--package "$name"); done
echo "guests: building ${*:-all of them}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
cargo build --release --locked "${packages[@]}" 2>&1 | tee "$log"
# A lock file made without the patches keeps the originals, and cargo only warns.
if grep -q 'was not used in the crate graph' "$log"; then
  echo "guests: a patch in guests/Cargo.toml is not in use (see above): delete Cargo.lock or run cargo update" >&2
  exit 1
fi
mkdir -p out
for manifest in */Cargo.toml; do
  name=$(dirname "$manifest")
  [ $# -eq 0 ] || [[ " $* " == *" $name "* ]] || continue
  # A program keeps the package's name; a library, as C-style modules are, has underscores.
  for built in "$CARGO_TARGET_DIR/wasm32-wasip1/release/$name.wasm" "$CARGO_TARGET_DIR/wasm32-wasip1/release/${name//-/_}.wasm"; do
    if [ -f "$built" ]; then
      cp "$built" "out/$name.wasm"
      printf 'guests: out/%s.wasm %d KiB\n' "$name" $(($(stat -c %s "$built") / 1024))
      break
    fi
  done
done
