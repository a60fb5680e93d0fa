#!/usr/bin/env bash
# Submits a run: to the service at POTSTILL_URL, or as a job of the Ray cluster whose job API is at RAY_ADDRESS.
#
#   submit.sh CONFIG [CHANGE…]       changes such as optim.lr=1e-4
#
# On Ray the run is started in this folder, which the cluster's machines see under the same path; RAY_AUTH_TOKEN or
# RAY_AUTH_TOKEN_PATH is the cluster's token. Refuses words that a shell on the other side would read as more than text.
set -euo pipefail

refuse() {
  echo "submit.sh: $1" >&2
  exit 2
}
config=${1:-}
[ -n "$config" ] || refuse "which CONFIG?"
[ -r "$config" ] || refuse "$config cannot be read"
python=${PYTHON:-python3}
if [ -n "${POTSTILL_URL:-}" ]; then
  exec "$python" -m potstill submit "$@"
fi
[[ ${RAY_ADDRESS:-} =~ ^https?:// ]] || refuse "set POTSTILL_URL, or RAY_ADDRESS to the job API, http://HOST:PORT"
[ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ] || refuse "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"

run=(env --chdir="$PWD" "$(command -v "$python")" -m potstill run "$@")
for word in "${run[@]}"; do
  [[ $word =~ ^[A-Za-z0-9_./=,:+@%-]+$ ]] || refuse "$word: letters, digits and _ . / = , : + @ % - only"
done
RAY_AUTH_MODE=token exec "$python" -m ray.scripts.scripts job submit --address "$RAY_ADDRESS" -- "${run[@]}"
