#!/usr/bin/env bash
# Ray on a bare machine, behind a token: the head of a cluster, or a worker that joins it.
#
#   up.sh head                       says how the others reach it
#   up.sh worker HEAD_ADDRESS        HOST:PORT, as the head said it
#   up.sh … -- OPTION…               further options of `ray start`, such as --resources '{"a100": 8}'
#
#   RAY_AUTH_TOKEN, or the name of a file with it in RAY_AUTH_TOKEN_PATH: the same on every machine
#   POTSTILL_RAY_BIND        this machine's address in the cluster's private network       127.0.0.1, without workers
#   POTSTILL_RAY_PORT        of the head                                                   6379
#   POTSTILL_RAY_DASHBOARD   HOST:PORT of the head's job API                               127.0.0.1:8265
#   POTSTILL_RAY_STATE       folder of the process id and the log                          ~/.local/state/potstill-ray
#   PYTHON                   of the environment with Ray                                   python3
#
# Between machines Ray listens on every address that a machine has, behind the token: let a firewall keep others out.
# Refuses to start without a token, and a second time over the same folder. down.sh ends what this started.
set -euo pipefail

refuse() {
  echo "up.sh: $1" >&2
  exit 2
}
born() { # PID: when the system says that it began, to tell it from a later process of that number
  sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20
}

role=${1:-}
case $role in
  head) shift ;;
  worker)
    head=${2:-}
    [[ $head =~ ^[^[:space:]]+:[0-9]+$ ]] || refuse "worker wants the head's address, HOST:PORT"
    shift 2
    ;;
  *) refuse "say head, or worker HEAD_ADDRESS" ;;
esac
if [ $# -gt 0 ]; then
  [ "$1" = -- ] || refuse "what is $1? Options of ray start come after --"
  shift
fi
if [ -n "${RAY_AUTH_TOKEN_PATH:-}" ] && [ -z "${RAY_AUTH_TOKEN:-}" ]; then
  [ -s "$RAY_AUTH_TOKEN_PATH" ] || refuse "RAY_AUTH_TOKEN_PATH $RAY_AUTH_TOKEN_PATH: no token is there"
elif [ -z "${RAY_AUTH_TOKEN:-}" ]; then
  refuse "whoever reaches Ray runs code on it: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
fi

state=${POTSTILL_RAY_STATE:-${XDG_STATE_HOME:-$HOME/.local/state}/potstill-ray}
bind=${POTSTILL_RAY_BIND:-127.0.0.1}
[ "$role" = head ] || [ "$bind" != 127.0.0.1 ] || refuse "set POTSTILL_RAY_BIND to an address that the head can reach"
dashboard=${POTSTILL_RAY_DASHBOARD:-127.0.0.1:8265}
(umask 077 && mkdir -p -- "$state")
if [ -e "$state/node" ]; then
  read -r pid since _ <"$state/node"
  [ "$(born "$pid")" != "$since" ] || refuse "process $pid of $state is up already: down.sh ends it"
fi

temp=$(mktemp -d /tmp/potstill-ray-XXXXXXXX) # short: Ray puts Unix sockets below it
options=(--block --disable-usage-stats --node-ip-address="$bind" --min-worker-port=0 --max-worker-port=0)
options+=(--temp-dir="$temp")
if [ "$role" = head ]; then
  head=$bind:${POTSTILL_RAY_PORT:-6379}
  options+=(--head --no-monitor --port="${head##*:}")
  options+=(--dashboard-host="${dashboard%:*}" --dashboard-port="${dashboard##*:}")
else
  options+=(--address="$head")
fi
if [ "$bind" = 127.0.0.1 ]; then # otherwise Ray turns it into an address that others can reach
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
fi
RAY_AUTH_MODE=token setsid env -u POTSTILL_API_KEY \
  "${PYTHON:-python3}" -m ray.scripts.scripts start "${options[@]}" "$@" >"$state/ray.log" 2>&1 </dev/null &
pid=$!
since=$(born "$pid") || since=gone # it has ended already
echo "$pid $since $temp" >"$state/node"

for _ in {1..240}; do
  if grep -q 'Ray runtime started' "$state/ray.log"; then
    echo "$role is up: process $pid, log $state/ray.log"
    [ "$role" = worker ] || echo "job API: RAY_ADDRESS=http://$dashboard"
    [ "$role" = worker ] || [ "$bind" = 127.0.0.1 ] || echo "workers: up.sh worker $head"
    exit 0
  fi
  kill -0 "$pid" 2>/dev/null || break
  sleep 0.5
done
tail -n 20 "$state/ray.log" >&2
echo "up.sh: Ray did not start" >&2
"$(dirname -- "${BASH_SOURCE[0]}")/down.sh" >&2
exit 1
