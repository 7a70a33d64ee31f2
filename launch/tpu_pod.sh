#!/usr/bin/env bash
# Trains on a slice of Cloud TPUs, one process a host, and goes on after preemptions.
#   launch/tpu_pod.sh [--dry-run] ACTION NAME --zone=ZONE --type=TYPE [--version=VERSION] [--spot] [--queued]
#                     [--mount=COMMAND] [-- ARGUMENTS]
# ACTION is train, which is all of the following (where the slice is missing or preempted it is made anew, and the run
# resumes; it is deleted when the run has finished, and left as it is when the run has failed), or one of
#   create   makes the slice: on demand, or with --spot; with --queued, waits in the queue for one
#   setup    copies the last commit of this checkout to every host, and installs it
#   run      runs experiments.main with the ARGUMENTS on every host; what still runs there is stopped first
#   stop     SIGTERM on every host: the run saves and ends (Ctrl-C here ends only the connection)
#   delete   deletes the slice
# Needs gcloud, logged in, with a project set, and the key that it makes (`ssh-add ~/.ssh/google_compute_engine`).
# TYPE is such as v5litepod-16 or v5p-128; VERSION (the hosts' software) follows from these two. --workdir= must outlive
# the slice and be seen by all hosts: a bucket (gs://BUCKET/runs/NAME), or a file server: --mount is a command that setup
# runs on every host, such as --mount='sudo mkdir -p /runs; mountpoint -q /runs || sudo mount ADDRESS:/SHARE /runs'.
# --dry-run prints the commands. POLL: seconds between two looks at the slice, 30 by default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

dry_run='' action='' name='' zone='' type='' version='' spot=() queued='' mount=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --queued) queued=yes ;;
    --mount=*) mount=("${1#*=}") ;;
    -*) usage "unknown option: $1" ;;
    *) if [ -z "$action" ]; then action=$1; else name=$1; fi ;;
  esac
  shift
done
[ $# = 0 ] || shift  # the --
arguments=("$@")
[ -n "$name" ] || usage 'ACTION or NAME is missing'
[ -n "$zone" ] || usage '--zone is missing'
[ -n "$type" ] || usage '--type is missing'
backend=tpu
case $type in
  v5litepod-*) backend=tpu-v5e version=${version:-v2-alpha-tpuv5-lite} ;;
  v5p-*) backend=tpu-v5p version=${version:-v2-alpha-tpuv5} ;;
esac
[ -n "$version" ] || usage "--version is missing, and does not follow from --type=$type"

tpus() { run gcloud compute tpus "$@" "--zone=$zone"; }
on_every_host() { tpus tpu-vm ssh "$name" --worker=all "--command=$1"; }

create() {
  if [ -n "$queued" ]; then
    tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version" \
      "${spot[@]}"
  else
    tpus tpu-vm create "$name" "--accelerator-type=$type" "--version=$version" "${spot[@]}"
  fi
}

# Chained, because a function that is asked for its status goes on after a failure.
setup() {
  local archive=loopformer.tar.gz
  run mkdir -p build &&
    run git archive --prefix=loopformer/ "--output=build/$archive" HEAD &&
    tpus tpu-vm scp "build/$archive" "$name:$archive" --worker=all &&
    on_every_host "tar -xzf $archive && $(quoted loopformer/launch/tpu_host.sh setup "${mount[@]}")"
}

run_on_hosts() {
  on_every_host "$(quoted loopformer/launch/tpu_host.sh run "$backend" --distributed "${arguments[@]}")"
}

delete() {
  if [ -n "$queued" ]; then
    tpus queued-resources delete "$name" --force --quiet
  else
    tpus tpu-vm delete "$name" --quiet
  fi
}

# The state of the slice, READY or ACTIVE where it can be used; nothing where there is none.
state() {
  local query=(tpu-vm describe "$name" '--format=value(state)')
  [ -z "$queued" ] || query=(queued-resources describe "$name" '--format=value(state.state)')
  if [ -z "$dry_run" ]; then
    tpus "${query[@]}" 2>/dev/null || true
  else
    tpus "${query[@]}" >&3
    [ -z "$had" ] || echo READY
  fi
}

train() {
  local now status looks
  while true; do
    now=$(state)
    case $now in
      READY | ACTIVE)
        had=yes status=0
        { setup && run_on_hosts; } || status=$?
        if [ "$status" = 0 ]; then
          delete
          return
        fi
        # A preemption may show in the state only after a while.
        for ((looks = 0; looks < 4; looks++)); do
          sleep "${POLL:-30}"
          case $(state) in READY | ACTIVE) ;; *) continue 2 ;; esac
        done
        echo "error: the run ended with status $status on a slice that is there: it has failed, or was stopped (75)." \
          'The slice is kept: the same command resumes, and the action delete deletes it' >&2
        return "$status"
        ;;
      '')
        # The first time a failure is the user's to look at; later ones are a lack of slices.
        create || [ -n "$had" ] || return 1
        had=yes
        [ -n "$dry_run" ] || sleep "${POLL:-30}"
        ;;
      PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED)
        echo "the slice is $now; it is made anew"
        delete
        ;;
      *)
        echo "the slice is $now"
        sleep "${POLL:-30}"
        ;;
    esac
  done
}

had=''  # whether there has been a slice
exec 3>&1
case $action in
  create | setup | delete | train) "$action" ;;
  run) run_on_hosts ;;
  stop) on_every_host 'loopformer/launch/tpu_host.sh stop' ;;
  *) usage "there is no action $action" ;;
esac
