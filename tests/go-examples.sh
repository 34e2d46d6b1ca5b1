#!/usr/bin/env bash
# go-examples.sh: builds programs that nobody here wrote, the examples of controller-runtime and
# client-go, as children: guests/out/go-example-NAME.wasm. Their sources are those of the versions
# that guests/go-ring depends on, unchanged.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${XDG_CACHE_HOME:-$HOME/.cache}/wasm-operator
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$cache/target}
echo "go-examples: building the parent operator (some minutes the first time)"
cargo build --quiet --locked
mkdir -p guests/out
for example in controller-runtime/{builtins,crd,typed,priorityqueue} client-go/{workqueue,leader-election}; do
  case $example in
  controller-runtime/*) module=sigs.k8s.io/controller-runtime ;;
  *) module=k8s.io/client-go ;;
  esac
  (cd guests/go-ring && go mod download "$module")
  directory=$(cd guests/go-ring && go list -m -f '{{.Dir}}' "$module")
  # Go overlays nothing in its module cache, so the checkout is a copy.
  checkout=$cache/go-examples/$(basename "$directory")
  if ! [ -d "$checkout" ]; then
    mkdir -p "$cache/go-examples"
    cp -R "$directory" "$checkout.$$"
    chmod -R u+w "$checkout.$$"
    mv -T "$checkout.$$" "$checkout"
  fi
  name=${example#*/}
  "$CARGO_TARGET_DIR/debug/wasm-operator" build-go "$checkout" "./examples/$name" -o "guests/out/go-example-$name.wasm"
done
