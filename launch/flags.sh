#!/usr/bin/env bash
# Prints the compiler flags of a backend as NAME=value, for `export "$(launch/flags.sh gpu)"`. What the variable holds
# already comes last, and wins.
#   launch/flags.sh cpu | gpu | tpu | tpu-v5e | tpu-v5p
# XLA_FLAGS is read on every backend, and XLA aborts at a flag that it does not know, so it never holds flags of TPUs:
# those go into LIBTPU_INIT_ARGS, which only libtpu reads (and it aborts too). Checked: jaxlib 0.10.2 and 0.11.2 (cpu,
# gpu), libtpu 0.0.42 and 0.0.48 (tpu). Meanings: https://docs.jax.dev/en/latest/xla_flags.html,
# https://docs.jax.dev/en/latest/gpu_performance_tips.html, https://docs.nvidia.com/jax-toolbox/environment-variables.
set -euo pipefail

xla=()
libtpu=()
# Overlaps collectives with computation. libtpu's defaults may be the same by now; saying so costs nothing.
overlap=(
  --xla_enable_async_all_gather=true
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
)
case ${1:-} in
  cpu)
    # Many emulated devices take turns on few cores; XLA aborts when one is 40 s late for a collective.
    xla=(--xla_cpu_collective_call_terminate_timeout_seconds=600)
    ;;
  gpu)
    # Gathers of parameters and reductions of gradients run beside computation.
    xla=(--xla_gpu_enable_latency_hiding_scheduler=true)
    ;;
  tpu) ;;
  tpu-v5e)
    libtpu=("${overlap[@]}")
    ;;
  tpu-v5p)
    # All-gathers are fused asynchronously instead of being shared by the chip's two cores.
    libtpu=("${overlap[@]}" --xla_tpu_megacore_fusion_allow_ags=false)
    ;;
  *)
    echo "error: flags.sh ${1:-}: choose from cpu, gpu, tpu, tpu-v5e, tpu-v5p" >&2
    exit 2
    ;;
esac
case $1 in
  tpu*) echo "LIBTPU_INIT_ARGS=${libtpu[*]:-}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}" ;;
  *) echo "XLA_FLAGS=${xla[*]}${XLA_FLAGS:+ $XLA_FLAGS}" ;;
esac
