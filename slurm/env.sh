# shellcheck shell=bash disable=SC2034  # job.sh reads them
# What a site changes, and the only file of this folder that it changes. The scripts read it on the login node and in
# the job. To keep a version of your own elsewhere: export EMU3_SITE=/path/to/it

# What to ask the queue for, where the command line does not say (man sbatch, INPUT ENVIRONMENT VARIABLES).
# export SBATCH_ACCOUNT=my_project
# export SBATCH_PARTITION=gpu
export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-24:00:00}
export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE-8} # empty: nodes without GPUs
# The run is told so many seconds before its time is over (Slurm may do it 60 s earlier): a step and a checkpoint.
export SBATCH_SIGNAL=${SBATCH_SIGNAL:-B:USR1@300}

# Python with this project in it: on a file system that all nodes see, or the name that it has inside the container.
PYTHON=${PYTHON:-.venv/bin/python}
# module load python/3.11 cuda/13.0

# A container, if any. Apptainer (or any program that runs a command) stands in front of each command:
CONTAINER=() # CONTAINER=(apptainer exec --nv --bind /data /images/emu3.sif)
# pyxis and enroot are options of srun; then HOST_PYTHON is a Python outside the container, for the checks on the login
# node and the job's own records. It needs this project; tokenizer.sbatch and preprocess_array.sbatch need torch too.
SRUN_OPTIONS=() # SRUN_OPTIONS=(--container-image=/images/emu3.sqsh --container-mounts="$PWD,/data" --container-workdir="$PWD")
HOST_PYTHON=${HOST_PYTHON:-$PYTHON}

# The network, as the site's manual says. Every variable here reaches every rank.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

# Look at the nodes for up to a minute before a run starts on them (tools/preflight.py): yes or no.
PREFLIGHT=${PREFLIGHT:-yes}
PREFLIGHT_OPTIONS=${PREFLIGHT_OPTIONS:-} # such as --min_disk_mbs 500
# How often torchrun starts the ranks again on healthy nodes before the job ends and goes back into the queue.
MAX_RESTARTS=${MAX_RESTARTS:-1}
# How often a task of preprocess_array.sbatch that failed, or ran out of time, goes back into the queue.
TASK_RESTARTS=${TASK_RESTARTS:-3}
