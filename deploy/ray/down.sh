#!/usr/bin/env bash
# Ends the Ray node that up.sh started on this machine, with every job on it, and no other process.
#
#   POTSTILL_RAY_STATE       as for up.sh
set -euo pipefail

state=${POTSTILL_RAY_STATE:-${XDG_STATE_HOME:-$HOME/.local/state}/potstill-ray}
if [ ! -e "$state/node" ]; then
  echo "down.sh: up.sh has started nothing in $state" >&2
  exit 2
fi
read -r pid since temp <"$state/node"

lives() { # the process that was recorded, not a later one of its number
  [ "$(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null | cut -d ' ' -f 20)" = "$since" ]
}
if lives; then
  kill -TERM "$pid"
  for _ in {1..180}; do # Ray drains its node for up to 30 s
    lives || break
    sleep 0.25
  done
  ! lives || kill -KILL "$pid"
fi
rm -rf -- "$temp"
rm -f -- "$state/node"
echo "process $pid is down"
