#!/usr/bin/env bash
# Trains on all devices of this machine and keeps a log: launch/local.sh CONFIG WORKDIR […]
# PYTHON=.venv/bin/python chooses the interpreter. CONFIG is relative to the repository.
set -euo pipefail
if [[ $# -lt 2 || $1 == -h || $1 == --help ]]; then
  echo "usage: $0 CONFIG WORKDIR [--config.field=value …]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
mkdir -p "$workdir"
workdir=$(realpath "$workdir")
cd "$(dirname "$0")/.."
# tee must outlive Ctrl-C, which the run answers by saving.
exec "${PYTHON:-python}" -m declip_jax.main --config "$config" --workdir "$workdir" "$@" \
  > >(tee -ia "$workdir/train.log") 2>&1
