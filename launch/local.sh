#!/usr/bin/env bash
# Several training processes on this machine, talking over loopback: the multi-host program without a cluster.
#
#   launch/local.sh --processes 2 --devices 4 -- --config=configs/demo.py --workdir=RUN --config.data.dir=DATA
#
# --processes N   processes (default 2)
# --devices D     fake CPU devices in each (default 1; 0: the GPUs of this machine, one process each, or
#                 those that CUDA_VISIBLE_DEVICES names)
# --module M      Python module to run (default terrafm_jax.main)
# --dry-run       print the commands
# PYTHON is the interpreter (default python): PYTHON=.venv/bin/python where no environment is active.
# A process that dies takes the others down (SIGTERM, after GRACE seconds SIGKILL: 20), and the last line of the job
# names it; the job is started again on exit code 42 (preempted), on 143 (SIGTERM came before it could save) and, up
# to MAX_RESTARTS times, on any other failure. SIGTERM and SIGINT are passed on and end the restarting.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

asked_for_help "$@"
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
[ "$module" != terrafm_jax.main ] || flags_given "$@"
python=${PYTHON:-python}
# Where CUDA_VISIBLE_DEVICES names this machine's GPUs that are ours, each process gets one of them.
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
if [ "$devices" = 0 ] && [ "${#gpus[@]}" -gt 0 ] && [ "${#gpus[@]}" -lt "$processes" ]; then
  die "--processes $processes, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names ${#gpus[@]}"
fi

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
    "${how[@]}" env CUDA_VISIBLE_DEVICES="${gpus[index]:-$index}" "$python" -m "$module" "$@" "${flags[@]}"
  fi
}

# ending CODE: an exit code for people.
ending() {
  local name
  if [ "$1" -gt 128 ] && name=$(kill -l "$1" 2>/dev/null); then
    printf 'SIG%s, exit code %s' "$name" "$1"
  else
    printf 'exit code %s' "$1"
  fi
}

# likely CODE: 0 where a process that ended so is the cause, more where it rather follows another one's end. JAX
# aborts (134) what is left of a job; whoever ended with 42 had seen the checkpoint complete, whatever came later.
likely() {
  case $1 in
    "$PREEMPTED") echo 0 ;;
    134) echo 3 ;;
    *) [ "$1" -gt 128 ] && echo 1 || echo 2 ;;
  esac
}

# blame INDEX:CODE...: of processes that ended between two looks, puts the code of the one to blame into `first` and
# names it in `culprit`; all that are as likely are named.
blame() {
  local pair code least=9 rank
  for pair in "$@"; do
    code=${pair#*:} rank=$(likely "${pair#*:}")
    if [ "$rank" -lt "$least" ]; then
      least=$rank first=$code culprit=
    fi
    [ "$rank" != "$least" ] || culprit+="${culprit:+ and }process ${pair%%:*} of $processes ($(ending "$code"))"
  done
}

# advise CODE: where to look for the reason.
advise() {
  case $1 in
    137) echo "whoever killed it knows why; where it was out of memory, the kernel's log says so (dmesg)" ;;
    *) echo "its own last lines above say why" ;;
  esac
}

# look: sorts `left` into those that still run and, in `failed`, those that ended with an error since the last look.
look() {
  local still=() i code
  failed=()
  for i in "${left[@]}"; do
    if kill -0 "${children[i]}" 2>/dev/null; then
      still+=("$i")
      continue
    fi
    code=0
    wait_child "${children[i]}" || code=$?
    [ "$code" = 0 ] || failed+=("$i:$code")
  done
  left=("${still[@]}")
}

# attend: until all children have ended; returns 0 or the code of the one to blame, which the last line names.
attend() {
  local left=("${!children[@]}") failed=() first=0 culprit='' deadline='' others='' i
  while [ "${#left[@]}" -gt 0 ]; do
    look
    if [ "$first" = 0 ] && [ "${#failed[@]}" -gt 0 ]; then
      blame "${failed[@]}"
      # After a preemption the others are saving the same checkpoint: let them finish.
      if [ "$first" != "$PREEMPTED" ] && [ "${#left[@]}" -gt 0 ]; then
        log "$culprit ended: stopping the others"
        for i in "${left[@]}"; do kill "${children[i]}" 2>/dev/null || true; done
        deadline=$((SECONDS + ${GRACE:-20}))
      fi
    fi
    # SIGTERM asks for a checkpoint, which nobody can write any more where the lost process held a part of the state.
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
      for i in "${left[@]}"; do
        log "process $i of $processes still waits for it: SIGKILL"
        kill -s KILL "${children[i]}" 2>/dev/null || true
      done
      deadline=
    fi
    sleep 0.2
  done
  case $first in
    0 | "$PREEMPTED" | "$TERMINATED") ;;
    *)
      [ "$processes" = 1 ] || others=" What the others say (a task died, a step broke off) follows from it."
      log "the job ended because of $culprit: $(advise "$first").$others" \
        "The next start resumes from the newest checkpoint."
      ;;
  esac
  return "$first"
}

once() {
  local port=PORT code=0 i
  if [ "$DRY_RUN" = 1 ]; then
    for ((i = 0; i < processes; i++)); do start_process "$port" "$i" "$@"; done
    return 0
  fi
  port=$("$python" "$here/free_port.py")
  children=()
  for ((i = 0; i < processes; i++)); do
    start_process "$port" "$i" "$@" &
    children+=($!)
  done
  pass_on_missed
  attend || code=$?
  children=()
  return "$code"
}

trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
until_done once "$@"
