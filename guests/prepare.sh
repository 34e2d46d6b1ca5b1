#!/usr/bin/env bash
# Makes guests/ buildable: the wasm32-wasip1 target, and a copy of tokio under another name.
# Quick when nothing is to do. Needs cargo only.
set -euo pipefail
cd "$(dirname "$0")"

if ! [ -d "$(rustc --print sysroot)/lib/rustlib/wasm32-wasip1" ]; then
  echo "guests: installing Rust's wasm32-wasip1 target"
  rustup target add wasm32-wasip1 >/dev/null 2>&1 || {
    echo "guests: cannot install it; try: rustup target add wasm32-wasip1" >&2
    exit 1
  }
fi

version=$(sed -n 's/^tokio = "=\(.*\)"$/\1/p' support/tokio/fetch/Cargo.toml)
upstream=support/tokio/upstream
[ "$(cat $upstream/.version 2>/dev/null)" != "$version" ] || exit 0
echo "guests: fetching tokio $version"
# Out of this workspace's reach: its patches would replace the very crate that is wanted.
manifest=support/tokio/fetch/Cargo.toml
cargo fetch --quiet --locked --manifest-path $manifest
source=$(cargo metadata --quiet --locked --offline --format-version 1 --manifest-path $manifest |
  grep -o "\"manifest_path\":\"[^\"]*/tokio-$version/Cargo.toml\"" | head -n 1 | cut -d '"' -f 4)
rm -rf $upstream
cp -R "$(dirname "$source")" $upstream
chmod -R u+w $upstream
# The package's name is all that changes; sources, examples and tests of other packages stay out.
sed -i '0,/^name = "tokio"$/s//name = "tokio-upstream"/; s/^name = "tokio"$/name = "tokio_upstream"/
  /^\[\[\(test\|bench\|example\)\]\]/,/^$/d' $upstream/Cargo.toml
rm -rf $upstream/tests $upstream/Cargo.lock
echo "$version" > $upstream/.version
