# shellcheck shell=bash
# Shared by the launchers: dry runs, and restarting on the preemption exit code. Source it, do not run it.

# Exit code of a training process that saved a checkpoint because it was told to stop (config.exit_code_preempted).
: "${PREEMPTED:=42}"
# Other failures are retried so often; preemptions do not count.
: "${MAX_RESTARTS:=3}"
: "${DRY_RUN:=0}"

log() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# run COMMAND...: prints the command in a dry run, else runs it.
run() {
  if [ "$DRY_RUN" = 1 ]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# need NAME...: stops when one of the variables is empty; names all that are.
need() {
  local name missing=()
  for name in "$@"; do
    [ -n "${!name:-}" ] || missing+=("$name")
  done
  [ "${#missing[@]}" = 0 ] || die "set ${missing[*]} (see docs/launch.md)"
}

# until_done COMMAND...: runs it again after a preemption, and MAX_RESTARTS times after another failure.
# Training resumes from the newest checkpoint by itself. Returns the last exit code.
until_done() {
  local failures=0 code
  while true; do
    code=0
    "$@" || code=$?
    if [ "$code" = 0 ]; then
      return 0
    elif [ "$code" = "$PREEMPTED" ]; then
      log "preempted with a checkpoint: starting again"
    else
      failures=$((failures + 1))
      if [ "$failures" -gt "$MAX_RESTARTS" ]; then
        log "exit code $code, $MAX_RESTARTS restarts used up"
        return "$code"
      fi
      log "exit code $code: restart $failures of $MAX_RESTARTS"
    fi
    sleep "${RESTART_DELAY:-5}"
  done
}
