#!/usr/bin/env bash
# Training in a container on this machine: builds the image, runs it, restarts it after a preemption. SIGTERM and
# SIGINT are passed on to the container, which saves, and end the restarting.
#
#   launch/docker.sh --extra cuda -- --config=configs/vits.py --workdir=/runs/s --config.data.dir=/data
#
# --extra E     cuda, tpu or empty (CPU)     --image NAME   (default terrafm:E)
# --mount A:B   repeated; host folder A appears as B in the container
# --no-build    use the image as it is       --dry-run      print the commands
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

asked_for_help "$@"
extra="" image="" build=1 mounts=()
while [ $# -gt 0 ]; do
  case $1 in
    --extra) extra=$2 && shift 2 ;;
    --image) image=$2 && shift 2 ;;
    --mount) mounts+=(--volume "$2") && shift 2 ;;
    --no-build) build=0 && shift ;;
    --dry-run) DRY_RUN=1 && shift ;;
    --) shift && break ;;
    *) die "unknown option $1; options of training come after --" ;;
  esac
done
image=${image:-terrafm:${extra:-cpu}}
devices=()
case $extra in
  cuda) devices=(--gpus all) ;;
  tpu) devices=(--privileged --network host) ;;
  "") ;;
  *) die "--extra $extra: expected cuda, tpu or nothing" ;;
esac
flags_given "$@"

[ "$build" = 0 ] || run docker build -f "$here/Dockerfile" --build-arg EXTRA="$extra" -t "$image" "$here/.."
# Input workers hand batches over through shared memory; the default 64 MB are too few.
command=(docker run --rm --init --shm-size=16g --stop-timeout=300 "${devices[@]}" "${mounts[@]}" "$image" "$@")
if [ "$DRY_RUN" = 1 ]; then
  run "${command[@]}"
  exit 0
fi

# The docker client hands the signals it gets to the container. Beside the shell, which hears none while it runs a
# command; in a session of its own, as a terminal's Ctrl-C would come twice.
once() {
  local code=0
  setsid "${command[@]}" &
  children=($!)
  pass_on_missed
  wait_child "${children[0]}" || code=$?
  children=()
  return "$code"
}

trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
until_done once
