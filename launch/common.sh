# shellcheck shell=bash
# Sourced by the launch scripts: what they share. Expects `dry_run` to be empty, or set where commands are only printed.

# Prints the comment at the top of the calling script, after a message, and ends it.
usage() {
  echo "error: $*" >&2
  sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0" >&2
  exit 2
}

# The words as a line that a shell reads as the same words.
quoted() {
  local word line=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@+-]*) word=${word@Q} ;;
    esac
    line+="${line:+ }$word"
  done
  echo "$line"
}

# Runs the command, or prints it in a dry run.
run() {
  if [ -n "${dry_run:-}" ]; then
    quoted "$@"
  else
    "$@"
  fi
}
