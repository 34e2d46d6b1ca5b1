#!/usr/bin/env bash
# wake.sh [OPTIONS]: how long children take to hibernate and to wake, and a nonce to travel round a
# ring of sleeping ones. --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/.."
guests=(ring ring-thin)
# shellcheck source=benches/build.sh
source benches/build.sh
exec "$tools/bench-wake" --repository "$PWD" --parent "$parent" --tools "$tools" --cache "$cache/bench" "$@"
