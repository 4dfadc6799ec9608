#!/bin/bash
# A shell on nodes of your own, set up as the jobs are; options are salloc's.
#   bash slurm/interactive.sh -N 1 --time 1:00:00
#   then, say: $PYTHON -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 8 pretrain_emu3.py --config FILE
set -euo pipefail
cd "$(dirname "$0")/.."
. slurm/job.sh
type -P salloc >/dev/null || fail "salloc is not there: run this on a login node of a Slurm cluster"
export PYTHON
# salloc has variables of its own.
for name in ACCOUNT PARTITION TIMELIMIT GPUS_PER_NODE; do
    value=SBATCH_$name
    [ -z "${!value-}" ] || export "SALLOC_$name=${!value}"
done
exec salloc --job-name=emu3-interactive "$@" srun --pty --nodes=1 --ntasks=1 --cpu-bind=none "${SRUN_OPTIONS[@]}" \
    "${CONTAINER[@]}" bash
