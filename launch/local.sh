#!/usr/bin/env bash
# Trains on all devices of this machine: launch/local.sh CONFIG WORKDIR [--config.field=value …]
set -euo pipefail
if [[ $# -lt 2 || $1 == -h || $1 == --help ]]; then
  echo "usage: $0 CONFIG WORKDIR [--config.field=value …]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
cd "$(dirname "$0")/.."
mkdir -p "$workdir"
exec python -m declip_jax.main --config "$config" --workdir "$workdir" "$@" \
  > >(tee -a "$workdir/train.log") 2>&1
