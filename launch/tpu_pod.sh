#!/usr/bin/env bash
# A TPU pod through queued resources: request, install, run on all workers, restart, delete.
#
#   export PROJECT=my-project ZONE=us-west4-a NAME=terrafm ACCELERATOR=v5litepod-64 REPOSITORY=https://... SPOT=1
#   launch/tpu_pod.sh up --config=configs/vitb.py --workdir=gs://BUCKET/run --config.data.dir=gs://BUCKET/data
#
# up FLAGS...     everything: create, wait, install, run, and again after every preemption until the run is complete
# create | wait | install | run FLAGS... | status | logs | stop | delete     the single steps
# --dry-run as the first argument prints the commands.
# SLICES=2 asks for two slices (multislice); SPOT=1 for preemptible capacity; RESERVED=1 for a reservation.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

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

state() {
  mapfile -t place < <(where)
  gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)' 2>/dev/null || echo MISSING
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
  on_workers "$steps"
}

# train FLAGS...: in the foreground of ssh; every worker appends to train.log.
train() {
  local flags
  flags=$(printf '%q ' "$@")
  on_workers "cd terrafm_jax && set -o pipefail && .venv/bin/python -m terrafm_jax.main ${flags}--distributed 2>&1 | tee -a train.log"
}

delete() {
  mapfile -t place < <(where)
  run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
}

# up FLAGS...: ssh returns the exit code of training, or its own 255 when the machine went away.
up() {
  local code=0 failures=0
  while true; do
    if [ "$DRY_RUN" = 1 ] || [ "$(state)" = MISSING ]; then create; fi
    if wait_active && install; then
      code=0
      train "$@" || code=$?
      [ "$DRY_RUN" = 0 ] || return 0
      if [ "$code" = 0 ]; then
        log "complete; the pod is still there: launch/tpu_pod.sh delete"
        return 0
      fi
    fi
    if [ "$(state)" = ACTIVE ] && [ "$code" != "$PREEMPTED" ]; then
      failures=$((failures + 1))
      [ "$failures" -le "$MAX_RESTARTS" ] || { log "exit code $code, $MAX_RESTARTS restarts used up" && return "$code"; }
      log "exit code $code: restart $failures of $MAX_RESTARTS"
    elif [ "$(state)" != ACTIVE ]; then
      log "the pod was taken away: asking for a new one"
      delete || true
      while [ "$(state)" != MISSING ]; do sleep "$POLL_SECONDS"; done
    else
      log "preempted with a checkpoint: starting again"
    fi
  done
}

mapfile -t place < <(where)
case $action in
  up) up "$@" ;;
  create) create ;;
  wait) wait_active ;;
  install) install ;;
  run) train "$@" ;;
  status) run gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" ;;
  logs) on_workers "tail -n 50 terrafm_jax/train.log" ;;
  stop) on_workers "pkill -TERM -o -f 'python -m terrafm_jax.main' || true" ;;
  delete) delete ;;
  *) die "unknown action $action" ;;
esac
