#!/usr/bin/env bash
# Makes guests/ buildable: Rust's wasm32-wasip1 target, and a copy of tokio under the name
# tokio-upstream. Quick when nothing is to do. Needs cargo only.
set -euo pipefail
cd "$(dirname "$0")"

if ! [ -d "$(rustc --print sysroot)/lib/rustlib/wasm32-wasip1" ]; then
  echo "guests: installing Rust's wasm32-wasip1 target"
  rustup target add wasm32-wasip1 >/dev/null 2>&1 || {
    echo "guests: cannot install it; try: rustup target add wasm32-wasip1" >&2
    exit 1
  }
fi

fetch=support/tokio/fetch/Cargo.toml
upstream=support/tokio/upstream
version=$(sed -n 's/^tokio = "=\(.*\)"$/\1/p' $fetch)
# A new version makes a new copy, and so does a change of this script.
made_from="$version $(cksum <prepare.sh)"
[ "$(cat $upstream/.made-from 2>/dev/null)" != "$made_from" ] || exit 0

echo "guests: fetching tokio $version"
# By a manifest that is not in this workspace, whose patches would replace the very crate that is
# wanted. Its lock file has the checksum.
cargo fetch --quiet --locked --manifest-path $fetch || {
  echo "guests: cannot fetch tokio $version; is there a network?" >&2
  exit 1
}
source=$(cargo metadata --quiet --locked --offline --format-version 1 --manifest-path $fetch |
  grep -o "\"manifest_path\":\"[^\"]*/tokio-$version/Cargo.toml\"" | head -n 1 | cut -d '"' -f 4)
# Made beside its place and moved there, since another build may be looking.
copy=$(mktemp -d support/tokio/upstream.XXXXXX)
trap 'rm -rf "$copy"' EXIT
cp -R "$(dirname "$source")/." "$copy"
chmod -R u+w "$copy"
rm -rf "$copy/tests" "$copy/Cargo.lock"
# The names of package and library are all that changes; tests, which need other crates, stay out.
sed -i '0,/^name = "tokio"$/s//name = "tokio-upstream"/; s/^name = "tokio"$/name = "tokio_upstream"/
  /^\[\[\(test\|bench\|example\)\]\]/,/^$/d' "$copy/Cargo.toml"
echo "$made_from" >"$copy/.made-from"
chmod 755 "$copy"
rm -rf $upstream
mv -T "$copy" $upstream
