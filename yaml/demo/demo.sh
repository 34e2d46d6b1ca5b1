#!/usr/bin/env bash
# demo.sh [--once] [--context NAME]: the parent operator with seven children on a
# real API server, and a nonce that travels round a ring of five of them.
#
# --once          end when every child has done its part (0), or after 90 s (1)
# --context NAME  use that cluster of your kubeconfig instead of a throw-away control plane
#
# Whatever it starts, it stops; Ctrl-C ends it.
set -euo pipefail
export LC_ALL=C # EPOCHREALTIME has a decimal comma in some locales

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
control_plane=$root/tests/control-plane/control-plane
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/wasm-operator/target}
label=app.kubernetes.io/part-of=wasm-operator-demo
time_limit=90
pause=5

say() { echo "demo: $*"; }
fail() { echo "demo: $*" >&2; exit 1; }

once= context=
while [ $# -gt 0 ]; do
    case $1 in
    --once) once=1 ;;
    --context) shift; context=${1:?demo: --context needs a name} ;;
    --context=*) context=${1#*=} ;;
    *) echo "usage: demo.sh [--once] [--context NAME]" >&2; exit 64 ;;
    esac
    shift
done

# What runs, and what must be undone. Ctrl-C would reach every process of the
# terminal at once, so each gets a session of its own (setsid) and is stopped in
# order: first the parent, then its cluster.
state=$(mktemp -d -t wasm-operator-demo.XXXXXX)
put_pid= watch_pid= parent_pid= control_plane_pid= made_namespaces= made_crd=
interrupted=130 # exit code of Ctrl-C; 0 once there is something to see

stop() { # stop PID...: SIGTERM, and wait for the end
    for pid in "$@"; do kill "$pid" 2>/dev/null || true; done
    for pid in "$@"; do wait "$pid" 2>/dev/null || true; done
}
clean_up() {
    trap '' INT TERM HUP # no half-done cleaning; every step below ends by itself
    stop $put_pid $watch_pid $parent_pid
    if [ -n "$made_namespaces" ]; then
        say "removing the demo's namespaces from $context"
        "${kube[@]}" delete namespaces --selector "$label" >/dev/null || true
    fi
    if [ -n "$made_crd" ]; then "${kube[@]}" delete --filename "$root/yaml/crd.yaml" >/dev/null || true; fi
    stop $control_plane_pid
    rm -rf "$state"
}
trap clean_up EXIT
trap 'echo; exit $interrupted' INT TERM HUP

# 1. Whose cluster: a throw-away one, or the one that was asked for and no other.
if [ -z "$context" ]; then
    "$control_plane" build >/dev/null
    kubectl=$("$control_plane" path kubectl)
    kubeconfig=$state/cluster/admin.kubeconfig
else
    kubectl=$(command -v kubectl || "$control_plane" path kubectl)
    kubeconfig=$state/kubeconfig
    (umask 077; "$kubectl" config view --context "$context" --minify --flatten --raw > "$kubeconfig")
fi
# kubectl would leave its discovery cache in the user's home, one for each port.
kube=("$kubectl" --kubeconfig "$kubeconfig" --cache-dir "$state/kubectl")
if [ -n "$context" ] && [ -n "$("${kube[@]}" get --filename "$here/namespaces.yaml" --ignore-not-found --output name)" ]; then
    fail "$context has namespaces of the demo already; to remove them: kubectl --context $context delete namespaces -l $label"
fi

# 2. Everything that has to be built.
"$root/guests/build.sh" simple ring comb
say "building the parent operator (some minutes the first time)"
cargo build --quiet --locked --manifest-path "$root/Cargo.toml"

# 3. The cluster, with the custom resource and the demo's namespaces.
if [ -z "$context" ]; then
    say "starting a control plane"
    # Its standard input is a pipe that only this script holds: it ends with us.
    coproc CONTROL_PLANE { exec setsid "$control_plane" run "$state/cluster"; }
    control_plane_pid=$CONTROL_PLANE_PID # bash unsets its variable when the process ends
    read -r answer <&"${CONTROL_PLANE[0]}" || fail "the control plane did not start"
    say "${answer##* server=} is ready"
else
    made_namespaces=1
    [ -n "$("${kube[@]}" get --filename "$root/yaml/crd.yaml" --ignore-not-found --output name)" ] || made_crd=1
fi
"${kube[@]}" apply --filename "$root/yaml/crd.yaml" --filename "$here/namespaces.yaml" >/dev/null
"${kube[@]}" wait --for=condition=Established --timeout=30s --filename "$root/yaml/crd.yaml" >/dev/null
# Established is not yet served: for a second it is "storage is (re)initializing", which kubectl waits out.
"${kube[@]}" get testresources --all-namespaces --output name >/dev/null

# 4. The parent, and a look at all TestResources. Its log goes to this terminal.
say "starting the parent operator with $(grep -c '^name:' "$here/wasm_config.yaml") children from yaml/demo/wasm_config.yaml"
KUBECONFIG=$kubeconfig setsid "$CARGO_TARGET_DIR/debug/wasm-operator" run "$here" &
parent_pid=$!
watch_testresources() {
    # A server ends every watch after a while. What it lists again is not shown twice.
    exec {changes}< <(exec setsid "${kube[@]}" get testresources --all-namespaces --watch \
        --output 'jsonpath={.metadata.namespace}/{.metadata.name} {.spec.nonce}{"\n"}')
    watch_pid=$!
}
declare -A nonces=()
watch_testresources

# arrived PLACE...: have all of them the nonce, or a later one?
arrived() { for place in "$@"; do [ "${nonces[$place/demo]:-0}" -ge "$nonce" ] || return 1; done; }
ring=(demo-ring-{0..4}) comb=(demo-comb{0..2})
is_complete() { arrived "${ring[@]}" && arrived "${comb[@]}" && [ "${nonces[demo-simple/cluster]:-0}" -ge "$visitors" ]; }

# put FILE: apply it while the changes are read, which are timed from the first one on.
put() {
    first_change=
    "${kube[@]}" apply --filename "$1" >/dev/null &
    put_pid=$!
}
# since_first_change sets $elapsed in ms.
since_first_change() {
    local now=$((${EPOCHREALTIME/./} / 1000))
    elapsed=$((now - ${first_change:=$now}))
}

# follow SECONDS CONDITION: print every change until the condition holds; false if it does not by then.
follow() {
    local deadline=$((SECONDS + $1)) object value
    while ! "$2"; do
        if read -r -t 1 -u "$changes" object value; then
            [[ $object == demo-* && ${nonces[$object]:-} != "$value" ]] || continue
            nonces[$object]=$value
            since_first_change
            printf 'demo: %6d ms  %-22s nonce %s\n' "$elapsed" "$object" "$value"
        elif [ $? -le 128 ]; then # an end, not a time-out
            exec {changes}<&-
            watch_testresources
        fi
        kill -0 "$parent_pid" 2>/dev/null || fail "the parent operator ended by itself"
        [ -z "$control_plane_pid" ] || kill -0 "$control_plane_pid" 2>/dev/null || fail "the control plane ended by itself"
        [ "$SECONDS" -lt "$deadline" ] || return 1
    done
}

# 5. The first nonce.
nonce=1 visitors=1
interrupted=0
say "creating TestResource demo with nonce 1 in demo-ring-0, demo-simple and demo-comb0"
put "$here/testresource.yaml"
if ! follow $time_limit is_complete; then
    arrived "${ring[@]}" || say "the ring is not closed"
    arrived "${comb[@]}" || say "comb has not done its part"
    [ -n "${nonces[demo-simple/cluster]:-}" ] || say "simple has not done its part"
    fail "not done after $time_limit s: see the log above"
fi
say "nonce $nonce went round the ring, simple and comb did their part: $elapsed ms"
if [ -n "$once" ]; then exit 0; fi

# 6. More of them, until Ctrl-C. The pause shows what others change meanwhile.
say "look at it from a second terminal:"
say "  $kubectl --kubeconfig $kubeconfig get testresources -A"
say "  $kubectl --kubeconfig $kubeconfig -n demo-ring-2 patch testresource demo --type merge -p '{\"spec\":{\"nonce\":1000}}'"
say "the next nonce comes every $pause s; Ctrl-C stops everything"
testresource() { # NAMESPACE NAME NONCE
    printf -- '---\n{apiVersion: amurant.io/v1, kind: TestResource, metadata: {namespace: %s, name: %s}, spec: {nonce: %d}}\n' "$@"
}
while true; do
    follow $pause false || true
    wait $put_pid
    nonce=$((${nonces[demo-ring-0/demo]} + 1)) visitors=$((visitors + 1))
    {
        testresource demo-ring-0 demo $nonce
        testresource demo-comb0 demo $nonce
        testresource demo-simple "visitor-$visitors" 1
    } > "$state/next.yaml"
    put "$state/next.yaml"
    follow $time_limit is_complete || fail "nonce $nonce did not arrive everywhere within $time_limit s"
    say "nonce $nonce went round: $elapsed ms"
done
