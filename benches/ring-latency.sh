#!/usr/bin/env bash
# ring-latency.sh [N]: how long ring takes to reconcile, as a native process, as a child, and as a
# thin child, side by side against one API server.
set -euo pipefail
cd "$(dirname "$0")/.."
count=${1:-500}
guests=(ring ring-thin)
# shellcheck source=benches/build.sh
source benches/build.sh

work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; tests/control-plane/control-plane down "$work/plane" >/dev/null 2>&1 || true; rm -rf "$work"' EXIT
KUBECONFIG=$(tests/control-plane/control-plane up "$work/plane" | tail -n 1)
export KUBECONFIG
kubectl=$(tests/control-plane/control-plane path kubectl)
"$kubectl" apply -f yaml/crd.yaml >/dev/null
"$kubectl" wait --for=condition=established crd/testresources.amurant.io >/dev/null
for operator in native child thin; do
  for side in in out; do "$kubectl" create namespace "$operator-$side" >/dev/null; done
done

for guest in ring ring-thin; do
  operator=child
  [ $guest = ring ] || operator=thin
  printf -- '---\nname: %s\nwasm: %s\nenv:\n- {name: IN_NAMESPACE, value: %s-in}\n- {name: OUT_NAMESPACE, value: %s-out}\n' \
    "$operator" "$PWD/guests/out/$guest.wasm" "$operator" "$operator" >> "$work/wasm_config.yaml"
done
IN_NAMESPACE=native-in OUT_NAMESPACE=native-out "$tools/ring-native" >"$work/native.log" 2>&1 &
"$parent" "$work" >"$work/parent.log" 2>&1 &

echo "bench: N=$count on $(nproc) cores, $(uname -m), $("$kubectl" version -o yaml | sed -n '/serverVersion/,$s/ *gitVersion: //p')"
"$tools/ring-latency" "$count" native=native-in:native-out child=child-in:child-out thin=thin-in:thin-out ||
  { tail -n 20 "$work"/*.log >&2; exit 1; }
