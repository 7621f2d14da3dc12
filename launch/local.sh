#!/usr/bin/env bash
# Several training processes on this machine, talking over loopback: the multi-host program without a cluster.
#
#   launch/local.sh --processes 2 --devices 4 -- --config=configs/demo.py --workdir=RUN --config.data.dir=DATA
#
# --processes N   processes (default 2)
# --devices D     fake CPU devices in each (default 1; 0: the GPUs of this machine, one process each)
# --module M      Python module to run (default terrafm_jax.main)
# --dry-run       print the commands
# A process that dies takes the others down (SIGTERM, after GRACE seconds SIGKILL: 20); the job is started again on
# exit code 42 (preempted), on 143 (SIGTERM came before it could save) and, up to MAX_RESTARTS times, on any other
# failure. SIGTERM and SIGINT are passed on and end the restarting.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

processes=2 devices=1 module=terrafm_jax.main
while [ $# -gt 0 ]; do
  case $1 in
    --processes) processes=$2 && shift 2 ;;
    --devices) devices=$2 && shift 2 ;;
    --module) module=$2 && shift 2 ;;
    --dry-run) DRY_RUN=1 && shift ;;
    --) shift && break ;;
    *) die "unknown option $1; options of training come after --" ;;
  esac
done
python=${PYTHON:-python}

free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
}

# start_process PORT INDEX FLAGS...: replaces the shell it runs in, so that signals reach Python; in a session of its
# own, as a terminal's Ctrl-C would come twice: from the terminal and passed on. The second one ends without saving.
start_process() {
  local port=$1 index=$2 how=(exec setsid)
  shift 2
  [ "$DRY_RUN" = 0 ] || how=(run)
  local flags=(--distributed --coordinator="localhost:$port" --processes="$processes" --process="$index")
  if [ "$devices" -gt 0 ]; then
    "${how[@]}" env JAX_PLATFORMS=cpu "$python" -m "$module" "$@" "${flags[@]}" --cpu_devices="$devices"
  else
    "${how[@]}" env CUDA_VISIBLE_DEVICES="$index" "$python" -m "$module" "$@" "${flags[@]}"
  fi
}

once() {
  local port=PORT code=0 first=0 i
  if [ "$DRY_RUN" = 1 ]; then
    for ((i = 0; i < processes; i++)); do start_process "$port" "$i" "$@"; done
    return 0
  fi
  port=$(free_port)
  children=()
  for ((i = 0; i < processes; i++)); do
    start_process "$port" "$i" "$@" &
    children+=($!)
  done
  pass_on_missed
  local left=("${children[@]}") still pid deadline=
  while [ "${#left[@]}" -gt 0 ]; do
    still=()
    for pid in "${left[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        still+=("$pid")
        continue
      fi
      code=0
      wait_child "$pid" || code=$?
      if [ "$code" != 0 ] && [ "$first" = 0 ]; then
        first=$code
        # After a preemption the others are saving the same checkpoint: let them finish.
        if [ "$code" != "$PREEMPTED" ]; then
          log "a process ended with $code: stopping the others"
          kill "${children[@]}" 2>/dev/null || true
          deadline=$((SECONDS + ${GRACE:-20}))
        fi
      fi
    done
    left=("${still[@]}")
    # SIGTERM asks for a checkpoint, which nobody can write any more where the lost process held a part of the state.
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ] && [ "${#left[@]}" -gt 0 ]; then
      kill -s KILL "${left[@]}" 2>/dev/null || true
    fi
    sleep 0.2
  done
  children=()
  return "$first"
}

trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
until_done once "$@"
