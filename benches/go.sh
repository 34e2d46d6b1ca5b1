#!/usr/bin/env bash
# go.sh [OPTIONS]: Go operators as children against native processes of the same source: memory,
# wakes, CPU per reconcile, and what they do when there is nothing to do. --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/.."
guests=(go-ring)
# shellcheck source=benches/build.sh
source benches/build.sh
native=$tools/go-ring-native
(cd guests/go-ring && go build -trimpath -ldflags='-s -w' -o "$native" .)
exec "$tools/bench-go" --repository "$PWD" --parent "$parent" --tools "$tools" --cache "$cache/bench" --native "$native" "$@"
