#!/usr/bin/env bash
# new-guest.sh NAME: makes guests/NAME, a child operator that builds, from template/.
set -euo pipefail
cd "$(dirname "$0")"
name=${1:-}
if ! [[ $name =~ ^[a-z][a-z0-9-]*$ ]]; then
  echo "usage: just new-guest NAME, of lower-case letters, digits and dashes" >&2
  exit 64
fi
[ ! -e "$name" ] || { echo "guests/$name exists already" >&2; exit 1; }
./prepare.sh
cp -R template "$name"
sed -i "s/NAME/$name/g" "$name/Cargo.toml"
# NAMESPACE is a word of its own.
sed -i "s/\bNAME\b/$name/g" "$name/src/main.rs"
sed -i "s/^members = \[$/&\n    \"$name\",/" Cargo.toml
# Brings the new member into the lock file; all else stays as it is locked.
cargo metadata --quiet --format-version 1 >/dev/null
cat <<END
guests/$name is made. Next:
  just build-guests $name          builds guests/out/$name.wasm
  and in a directory of your own, wasm_config.yaml:
    name: $name
    wasm: $PWD/out/$name.wasm
END
