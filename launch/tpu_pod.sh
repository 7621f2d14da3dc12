#!/usr/bin/env bash
# A TPU pod through queued resources: request, install, run on all workers, restart, delete.
#
#   export PROJECT=my-project ZONE=us-west4-a NAME=terrafm ACCELERATOR=v5litepod-64 REPOSITORY=https://... SPOT=1
#   export SETUP="launch/mount_bucket.sh BUCKET /mnt/bucket"
#   launch/tpu_pod.sh up --config=configs/vitb.py --workdir=gs://BUCKET/run --config.data.dir=/mnt/bucket/data
#
# up FLAGS...     everything: create, wait, install, run, and again after every preemption until the run is complete
# create | wait | install | run FLAGS... | status | logs | stop | delete     the single steps
# --dry-run as the first argument prints the commands.
# stop has Python save and end, and ends the restarting of up; the pod stays.
# SETUP is a command that every worker runs in the checkout after the installation, such as launch/mount_bucket.sh.
# SLICES=2 asks for two slices (multislice); SPOT=1 for preemptible capacity; RESERVED=1 for a reservation.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

asked_for_help "$@"
if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
action=${1:-}
[ -n "$action" ] || die "say what to do: up create wait install run status logs stop delete"
shift
need PROJECT ZONE NAME ACCELERATOR
: "${NAME:=}" "${SLICES:=1}" "${REPOSITORY:=}" "${REVISION:=main}" "${POLL_SECONDS:=30}"

runtime_version() {
  case $ACCELERATOR in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "ACCELERATOR=$ACCELERATOR: expected v4-N, v5litepod-N, v5p-N or v6e-N" ;;
  esac
}

where() { printf -- '--project=%s\n--zone=%s\n' "$PROJECT" "$ZONE"; }

# nodes: the names of the slices.
nodes() {
  local i
  if [ "$SLICES" = 1 ]; then
    echo "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
  fi
}

create() {
  local runtime=${RUNTIME:-} options
  [ -n "$runtime" ] || runtime=$(runtime_version)
  options=(--accelerator-type="$ACCELERATOR" --runtime-version="$runtime")
  if [ "$SLICES" = 1 ]; then
    options+=(--node-id="$NAME")
  else
    options+=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  [ -z "${SPOT:-}" ] || options+=(--spot)
  [ -z "${RESERVED:-}" ] || options+=(--reserved)
  [ -z "${NETWORK:-}" ] || options+=(--network="$NETWORK")
  mapfile -t place < <(where)
  run gcloud compute tpus queued-resources create "$NAME" "${place[@]}" "${options[@]}"
}

# state: of the queued resource; MISSING only where the answer is that there is none. Asks again after any other error
# (no network, no permission, a busy server): `up` deletes by this answer.
state() {
  local found errors
  errors=$(mktemp)
  mapfile -t place < <(where)
  while true; do
    if found=$(gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)' 2>"$errors"); then
      break
    elif grep -q -e NOT_FOUND -e 'was not found' "$errors"; then
      found=MISSING
      break
    fi
    log "cannot ask for the state of $NAME, trying again: $(tail -n 1 "$errors")"
    sleep "$POLL_SECONDS"
  done
  rm -f "$errors"
  echo "$found"
}

wait_active() {
  if [ "$DRY_RUN" = 1 ]; then
    mapfile -t place < <(where)
    run gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)'
    return 0
  fi
  local now
  while true; do
    now=$(state)
    log "$NAME is $now"
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | SUSPENDING | MISSING) return 1 ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# on_workers COMMAND: on all workers of all slices at once.
on_workers() {
  local node pids=() code=0 pid
  mapfile -t place < <(where)
  for node in $(nodes); do
    if [ "$DRY_RUN" = 1 ]; then
      run gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$1"
    else
      gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$1" &
      pids+=($!)
    fi
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return "$code"
}

install() {
  need REPOSITORY
  local steps repository revision
  repository=$(printf %q "$REPOSITORY")
  revision=$(printf %q "$REVISION")
  steps="set -e; test -d terrafm_jax || git clone $repository terrafm_jax; cd terrafm_jax"
  steps+="; git fetch origin $revision; git checkout --detach FETCH_HEAD"
  steps+="; python3 -m venv .venv; .venv/bin/pip install --quiet --upgrade pip; .venv/bin/pip install --quiet -e .[tpu]"
  steps+="${SETUP:+; $SETUP}"
  on_workers "$steps"
}

# Pieces of what workers run; their shell fills the variables in. train.pid names Python itself, as a pattern would find
# the shells around it, too. The file stop says that a person wants an end, so that 42 means no restart.
# shellcheck disable=SC2016
readonly RUNNING='pid=$(cat train.pid 2>/dev/null) && tr "\0" " " 2>/dev/null <"/proc/$pid/cmdline" | grep -q terrafm_jax.main'
# Where ssh broke off, Python goes on and holds the chips: it saves first. tee -p goes on with the file alone, then.
# shellcheck disable=SC2016
readonly TRAIN='test ! -e stop || exit STOPPED
if RUNNING; then
  kill -s TERM "$pid"
  for i in $(seq 300); do kill -0 "$pid" 2>/dev/null || break; sleep 1; done
fi
set -o pipefail; code=0
sh -c '\''echo $$ >train.pid; exec "$@"'\'' train .venv/bin/python -m terrafm_jax.main FLAGS 2>&1 | tee -p -a train.log || code=$?
case $code in PREEMPTED | TERMINATED) test ! -e stop || exit STOPPED ;; esac
exit $code'
# shellcheck disable=SC2016
readonly STOP='if RUNNING; then
  kill -s TERM "$pid" && echo "told process $pid to save and end"
else
  echo "nothing is running here"
fi'
readonly STOPPED=86 # exit code of TRAIN

# train FIRST FLAGS...: in the foreground of ssh; every worker appends to train.log. FIRST empty: goes on after a restart.
train() {
  local text=${TRAIN/RUNNING/"$RUNNING"} flags first=$1
  shift
  flags=$(printf '%q ' "$@" --distributed)
  text=${text//PREEMPTED/$PREEMPTED}
  text=${text//TERMINATED/$TERMINATED}
  text=${text//STOPPED/$STOPPED}
  on_workers "cd terrafm_jax || exit 1; ${first:+rm -f stop; }${text/FLAGS/"${flags% }"}"
}

# stop: first every worker's mark, then the signals: told on one worker, all save and end together.
stop() {
  on_workers "touch terrafm_jax/stop"
  on_workers "cd terrafm_jax || exit 1; ${STOP/RUNNING/"$RUNNING"}"
}

delete() {
  mapfile -t place < <(where)
  run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
}

# ended CODE: what a run that ended with 0 or STOPPED tells a person.
ended() {
  if [ "$1" = "$STOPPED" ]; then
    log "stopped on request; the pod is still there: the same command goes on, launch/tpu_pod.sh delete ends it"
  else
    log "complete; the pod is still there: launch/tpu_pod.sh delete"
  fi
}

# up FLAGS...: ssh returns the exit code of training, or its own 255 when the machine went away.
up() {
  local code first=1
  while true; do
    if [ "$DRY_RUN" = 1 ] || [ "$(state)" = MISSING ]; then create; fi
    code=1 # of an installation that fails: what pip or git said is no exit code of training
    if wait_active && install; then
      code=0
      train "$first" "$@" || code=$?
      first=""
      [ "$DRY_RUN" = 0 ] || return 0
      case $code in 0 | "$STOPPED") ended "$code" && return 0 ;; esac
    fi
    if [ "$(state)" = ACTIVE ]; then
      again "$code" || return "$code"
    else
      log "the pod was taken away: asking for a new one"
      delete || true
      while [ "$(state)" != MISSING ]; do sleep "$POLL_SECONDS"; done
    fi
  done
}

mapfile -t place < <(where)
case $action in up | run) flags_given "$@" ;; esac
case $action in
  up)
    [ "$DRY_RUN" = 1 ] || command -v gcloud >/dev/null || die "gcloud is not installed here"
    up "$@"
    ;;
  create) create ;;
  wait) wait_active ;;
  install) install ;;
  run)
    code=0
    train 1 "$@" || code=$?
    [ "$code" != "$STOPPED" ] || exit 0
    exit "$code"
    ;;
  status) run gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" ;;
  logs) on_workers "tail -n 50 terrafm_jax/train.log" ;;
  stop) stop ;;
  delete) delete ;;
  *) die "unknown action $action" ;;
esac
