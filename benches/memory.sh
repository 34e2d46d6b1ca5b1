#!/usr/bin/env bash
# memory.sh [OPTIONS]: memory of N operators, as children, as native processes and as one combined
# process. --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/.."
guests=(ring ring-thin)
# shellcheck source=benches/build.sh
source benches/build.sh
exec "$tools/bench-memory" --repository "$PWD" --parent "$parent" --tools "$tools" --cache "$cache/bench" "$@"
