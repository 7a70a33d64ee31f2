#!/usr/bin/env bash
# Trains on Kubernetes, as a JobSet: one pod a node, restarted together after a failure or preemption, resuming then.
#   launch/kubernetes.sh [--dry-run] NAME --image=IMAGE --volume=CLAIM --nodes=N --gpus=8 [--restarts=100] -- ARGUMENTS
#   launch/kubernetes.sh [--dry-run] NAME --image=IMAGE --volume=CLAIM --nodes=4 --tpu=tpu-v5-lite-podslice:4x4 ...
# ARGUMENTS go to experiments.main. IMAGE is built from launch/kubernetes/Containerfile; CLAIM is a persistent volume
# claim that all pods can write to (ReadWriteMany), mounted at /runs: --workdir= belongs there. --gpus: GPUs of a node.
# --tpu: accelerator and topology of a GKE node pool, whose hosts have 4 chips each (--chips= says otherwise).
# Needs kubectl, and JobSet in the cluster (https://jobset.sigs.k8s.io). --dry-run prints the manifest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

dry_run='' name='' image='' volume='' nodes='' gpus='' tpu='' chips=4 restarts=100
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --image=*) image=${1#*=} ;;
    --volume=*) volume=${1#*=} ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --tpu=*) tpu=${1#*=} ;;
    --chips=*) chips=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    -*) usage "unknown option: $1" ;;
    *) name=$1 ;;
  esac
  shift
done
[ $# -gt 0 ] || usage 'there is no --, after which the arguments of experiments.main come'
shift
[ -n "$name" ] || usage 'NAME is missing'
[ -n "$image" ] || usage '--image is missing'
[ -n "$volume" ] || usage '--volume is missing'
[ -n "$nodes" ] || usage '--nodes is missing'
case ${gpus:+gpus}${tpu:+tpu} in
  gpus) template=gpu chips=$gpus ;;
  tpu) template=tpu ;;
  *) usage 'give one of --gpus and --tpu' ;;
esac
backend=tpu
case $tpu in
  tpu-v5-lite*) backend='tpu-v5e' ;;
  tpu-v5p*) backend='tpu-v5p' ;;
esac

# The arguments as a list of YAML strings; $( is Kubernetes' own sign, and doubled means itself.
list=''
for word in "$@"; do
  word=${word//\\/\\\\}
  word=${word//\"/\\\"}
  word=${word//$'\n'/\\n}
  # shellcheck disable=SC2016  # it is to stand as it is
  word=${word//'$('/'$$('}
  list+="${list:+, }\"$word\""
done

# Values from the command line come last, so that a dollar in them stands for itself.
manifest=$(< "launch/kubernetes/$template.yaml")
fill() { manifest=${manifest//"\$$1"/"$2"}; }
fill RESTARTS "$restarts"
fill NODES "$nodes"
fill CHIPS "$chips"
fill BACKEND "$backend"
fill ACCELERATOR "${tpu%%:*}"
fill TOPOLOGY "${tpu#*:}"
fill IMAGE "$image"
fill VOLUME "$volume"
fill NAME "$name"
fill ARGUMENTS "[$list]"

if [ -n "$dry_run" ]; then
  echo "$manifest"
else
  kubectl apply -f - <<< "$manifest"
fi
