# shellcheck shell=bash
# Shared by the launchers: dry runs, signals, and when to start again. Source it, do not run it.

# Exit code of a training process that saved a checkpoint because it was told to stop (config.exit_code_preempted).
: "${PREEMPTED:=42}"
# Other failures are retried so often; preemptions do not count.
: "${MAX_RESTARTS:=3}"
# SIGTERM ends a process with 143 while it still imports and cannot listen. That is a preemption with nothing to save;
# so many in a row are none, as something here kills whatever is started.
: "${MAX_EARLY:=10}"
: "${DRY_RUN:=0}"
readonly TERMINATED=143
# Training's exit code for wrong flags: they are as wrong the next time.
readonly WRONG_FLAGS=2

log() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# asked_for_help WORD: prints the comment at the top of the calling script, and ends, if the word asks for it.
asked_for_help() {
  case ${1:-} in
    -h | --help)
      awk 'NR > 1 && !/^#( |$)/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
      exit 0
      ;;
  esac
}

# flags_given FLAGS...: stops before anything is built, or costs money, where training would refuse to start.
flags_given() {
  [ $# -gt 0 ] || die "no flags of training (--config=... --workdir=...); --help shows an example"
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

# wait_child PID: its exit code, also when a signal to this script interrupts the waiting.
wait_child() {
  local code again
  while true; do
    code=0
    wait "$1" || code=$?
    kill -0 "$1" 2>/dev/null || break
  done
  # A signal just before its end leaves the signal's code here; asked again, bash still knows that of the child.
  if [ "$code" -gt 128 ]; then
    again=0
    wait "$1" 2>/dev/null || again=$?
    [ "$again" = 127 ] || code=$again
  fi
  return "$code"
}

failures=0 # ends that counted
early=0    # ends with 143 in a row
# again CODE: whether to start again after training ended with CODE (not 0). Says why, and counts.
again() {
  if [ "$1" = "$PREEMPTED" ]; then
    early=0
    log "preempted with a checkpoint: starting again"
  elif [ "$1" = "$TERMINATED" ]; then
    early=$((early + 1))
    if [ "$early" -gt "$MAX_EARLY" ]; then
      log "exit code $1 for the ${early}th time in a row: something here ends every start"
      return 1
    fi
    log "told to stop before it could save (exit code $1): starting again"
  elif [ "$1" = "$WRONG_FLAGS" ]; then
    log "exit code $1: wrong flags, which another start does not mend"
    return 1
  else
    early=0
    failures=$((failures + 1))
    if [ "$failures" -gt "$MAX_RESTARTS" ]; then
      log "exit code $1, $MAX_RESTARTS restarts used up"
      return 1
    fi
    log "exit code $1: restart $failures of $MAX_RESTARTS"
  fi
}

children=() # processes that a signal to this script is passed on to
stopping="" # the last one there was
# pass_on SIGNAL: to the children, and no restart afterwards.
pass_on() {
  stopping=$1
  [ "${#children[@]}" = 0 ] || kill -s "$1" "${children[@]}" 2>/dev/null || true
}

# pass_on_missed: once more where it came while they were being started.
pass_on_missed() {
  [ -z "$stopping" ] || pass_on "$stopping"
}

# until_done COMMAND...: runs it as often as `again` says. Training resumes from the newest checkpoint by itself.
# Returns the last exit code; after a signal to this script, where whoever sent it may start again, 42 for 143.
until_done() {
  local code=$PREEMPTED
  while true; do
    if [ -z "$stopping" ]; then
      code=0
      "$@" || code=$?
    fi
    if [ -n "$stopping" ]; then
      [ "$code" != "$TERMINATED" ] || code=$PREEMPTED
      return "$code"
    fi
    [ "$code" != 0 ] || return 0
    again "$code" || return "$code"
    sleep "${RESTART_DELAY:-5}"
  done
}
