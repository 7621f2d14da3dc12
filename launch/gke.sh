#!/usr/bin/env bash
# Training on GKE as a JobSet: fills launch/gke/jobset.yaml and applies it.
#
#   export NAME=terrafm IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/terrafm TOPOLOGY=4x4 CHIP=v5e SLICES=2
#   launch/gke.sh render|apply|xpk|delete --config=configs/vitb.py --workdir=gs://BUCKET/run --config.data.dir=gs://...
#
# render prints the manifest, apply hands it to kubectl, xpk prints and runs the same as an XPK workload.
# --dry-run as the first argument prints the commands. Settings: see docs/launch.md.
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
[ -n "$action" ] || die "say what to do: render apply xpk delete"
shift
need NAME IMAGE TOPOLOGY CHIP
: "${SLICES:=1}" "${RESTARTS:=$MAX_RESTARTS}"

# The shapes that are sold; v4 and v5p also come in whole cubes of 4x4x4, up to so many chips.
flat="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16" cubic="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4"
case $CHIP in
  v4) selector=tpu-v4-podslice per_host=4 shapes=$cubic most=4096 ;;
  v5e) selector=tpu-v5-lite-podslice per_host=4 shapes=$flat most=0 ;;
  v5p) selector=tpu-v5p-slice per_host=4 shapes=$cubic most=6144 ;;
  v6e) selector=tpu-v6e-slice per_host=4 shapes=$flat most=0 ;;
  *) die "CHIP=$CHIP: expected v4, v5e, v5p or v6e" ;;
esac

# Whether slices of the chip have this shape. A pod of another waits for a node that no pool can have.
is_sold() {
  [[ " $shapes " != *" $TOPOLOGY "* ]] || return 0
  [[ $most != 0 && $TOPOLOGY =~ ^([1-9][0-9]?)x([1-9][0-9]?)x([1-9][0-9]?)$ ]] || return 1
  local a=${BASH_REMATCH[1]} b=${BASH_REMATCH[2]} c=${BASH_REMATCH[3]}
  ((a % 4 + b % 4 + c % 4 == 0 && a <= b && b <= c && a * b * c <= most))
}

cubes=""
[ "$most" = 0 ] || cubes=", or AxBxC of multiples of 4 with A <= B <= C, up to $most chips"
is_sold || die "TOPOLOGY=$TOPOLOGY: no slice of $CHIP has this shape, expected one of $shapes$cubes"
# Jobs, pods and their host names begin with it: NAME-slice-SLICE-HOST-RANDOM has to fit in 63 characters.
[[ ${NAME:-} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  die "NAME=$NAME: expected a lower-case letter, then letters, digits and dashes, at most 40 in all"
chips=$((${TOPOLOGY//x/*}))
hosts=$(((chips + per_host - 1) / per_host))

render() {
  local flag flags=""
  for flag in "$@" --distributed; do
    flag=${flag//\\/\\\\}
    flags+=", \"${flag//\"/\\\"}\""
  done
  local text
  text=$(<"$here/gke/jobset.yaml")
  text=${text//@NAME@/$NAME}
  text=${text//@IMAGE@/$IMAGE}
  text=${text//@SLICES@/$SLICES}
  text=${text//@HOSTS@/$hosts}
  text=${text//@CHIPS_PER_HOST@/$((chips < per_host ? chips : per_host))}
  text=${text//@SELECTOR@/$selector}
  text=${text//@TOPOLOGY@/$TOPOLOGY}
  text=${text//@PREEMPTED@/$PREEMPTED}
  text=${text//@RESTARTS@/$RESTARTS}
  # Quoted once more: a bare & would stand for what it replaces.
  printf '%s\n' "${text//@FLAGS@/"${flags#, }"}"
}

xpk() {
  need CLUSTER PROJECT ZONE
  local type=$CHIP-$chips command="python -m terrafm_jax.main"
  [ "$CHIP" != v5e ] || type=v5litepod-$chips
  # v4 and v5p are named by their cores, of which a chip has two.
  case $CHIP in v4 | v5p) type=$CHIP-$((2 * chips)) ;; esac
  command+=$(printf ' %q' "$@" --distributed)
  run xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" --workload="$NAME" \
    --tpu-type="$type" --num-slices="$SLICES" --docker-image="$IMAGE" --max-restarts="$RESTARTS" \
    --restart-on-exit-codes="$PREEMPTED" --command="$command"
}

case $action in render | apply | xpk) flags_given "$@" ;; esac
case $action in
  render) render "$@" ;;
  apply)
    if [ "$DRY_RUN" = 1 ]; then
      run kubectl apply -f -
      render "$@"
    else
      render "$@" | kubectl apply -f -
    fi
    ;;
  xpk) xpk "$@" ;;
  delete) run kubectl delete jobset "$NAME" ;;
  *) die "unknown action $action" ;;
esac
