#!/usr/bin/env bash
# checks.sh [RUNS]: what the checks cost by which a guest can be stopped: size of the code, time to
# compile, and CPU time of the worker threads while ring starts with 1,000 objects and reconciles
# each. The same parent is built with and without them; the runs take turns.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-7}
objects=1000
guests=(ring)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/wasm-operator
target=${CARGO_TARGET_DIR:-$cache/target}

guests/build.sh "${guests[@]}" >&2
tests/control-plane/control-plane build >/dev/null
work=$(mktemp -d -t wasm-operator-checks.XXXXXX)
trap 'kill $(jobs -p) 2>/dev/null || true; tests/control-plane/control-plane down "$work/plane" >/dev/null 2>&1 || true; rm -rf "$work"' EXIT
for kind in without with; do
  features=()
  [ $kind = with ] || features=(--features without-checks)
  echo "bench: building the parent operator $kind checks (release)" >&2
  CARGO_TARGET_DIR=$target cargo build --quiet --release --locked "${features[@]}"
  cp "$target/release/wasm-operator" "$work/$kind"
done
KUBECONFIG=$(tests/control-plane/control-plane up "$work/plane" | tail -n 1)
export KUBECONFIG
kubectl=$(tests/control-plane/control-plane path kubectl)
"$kubectl" apply -f yaml/crd.yaml >/dev/null
"$kubectl" wait --for=condition=established crd/testresources.amurant.io >/dev/null
for namespace in in with without; do "$kubectl" create namespace "$namespace" >/dev/null; done
echo "bench: making $objects objects" >&2
for ((i = 0; i < objects; i++)); do
  printf -- '---\napiVersion: amurant.io/v1\nkind: TestResource\nmetadata: {name: t%d, namespace: in}\nspec: {nonce: 1}\n' "$i"
done > "$work/objects.yaml"
until "$kubectl" apply -f "$work/objects.yaml" >/dev/null 2>"$work/apply.log"; do sleep 1; done
for kind in with without; do
  mkdir "$work/$kind.d"
  printf 'name: ring\nwasm: %s\nhibernate: never\nenv:\n- {name: IN_NAMESPACE, value: in}\n- {name: OUT_NAMESPACE, value: %s}\n' \
    "$PWD/guests/out/ring.wasm" $kind > "$work/$kind.d/wasm_config.yaml"
done

# Ticks that the workers of a process have used (proc_pid_stat(5), utime and stime).
worker_ticks() {
  local task
  for task in /proc/"$1"/task/*; do
    case $(< "$task/comm") in worker-*) sed 's/.*) //' "$task/stat" ;; esac
  done | awk '{ ticks += $12 + $13 } END { print ticks + 0 }'
}
median() { sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }

for ((run = 0; run < runs; run++)); do
  for kind in with without; do
    rm -f "$work/elf" "$work/image"
    started=${EPOCHREALTIME/[.,]/}
    "$work/$kind" compile "$work/elf" "$work/image" < guests/out/ring.wasm >/dev/null
    echo $(((${EPOCHREALTIME/[.,]/} - started) / 1000)) >> "$work/$kind.compile"
    stat -c %s "$work/elf" > "$work/$kind.bytes"
    "$kubectl" delete --raw "/apis/amurant.io/v1/namespaces/$kind/testresources" >/dev/null
    until [ -z "$("$kubectl" get testresources -n $kind -o name)" ]; do sleep 0.2; done
    "$work/$kind" "$work/$kind.d" --cache-dir "$work/artifacts" >"$work/$kind.log" 2>&1 &
    parent=$!
    until [ "$("$kubectl" get testresources -n $kind -o name | wc -l)" = $objects ]; do
      kill -0 $parent || { tail "$work/$kind.log" >&2; exit 1; }
      sleep 0.2
    done
    worker_ticks $parent >> "$work/$kind.ticks"
    kill $parent
    wait $parent || true
  done
  echo "bench: run $((run + 1)) of $runs" >&2
done

echo "| | without | with | ratio |"
echo "|---|---|---|---|"
row() { # row TITLE FILE FACTOR
  local without with
  without=$(median < "$work/without.$2")
  with=$(median < "$work/with.$2")
  awk -v t="$1" -v a="$without" -v b="$with" -v f="$3" 'BEGIN { printf "| %s | %d | %d | %.2f |\n", t, a * f, b * f, b / a }'
}
row "code of ring, bytes" bytes 1
row "compile, ms (median of $runs)" compile 1
row "CPU of the workers for 1,000 objects, ms (median of $runs)" ticks $((1000 / $(getconf CLK_TCK)))
