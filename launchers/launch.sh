#!/usr/bin/env bash
# Start `dsmoe_megatron pretrain` with torchrun, on this machine or on every node of a SLURM job.
#   launch.sh RECIPE [--section.key VALUE ...]     RECIPE is a name in launchers/recipes
# Environment:
#   DSMOE_PROCESSES_PER_NODE   default: one per GPU, or per core where there is none
#   DSMOE_PYTHON               default: the repository's .venv, else python3
#   DSMOE_DRY_RUN=1            check the recipe, print the command and stop
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
recipe=$root/launchers/recipes/$1.yaml
shift

python=${DSMOE_PYTHON:-$root/.venv/bin/python}
if [[ ! -x $python && -z ${DSMOE_PYTHON:-} ]]; then python=python3; fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # found without an installation, whatever the working directory
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun hands these on, and then gives the ranks this long [s] to finish a step and save before it kills them
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-600}
# megatron-core overlaps communication with computation in the order of their launch
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
verb=(dsmoe_megatron pretrain --config "$recipe" "$@")

case " $* " in
  *" -h "* | *" --help "* | *" --print_config"*) exec "$python" -m "${verb[@]}" ;;
esac
# one process reads the recipe first: a mistake is then said once, not by every process and torchrun
"$python" -m "${verb[@]}" --print_config > /dev/null

torchrun=("$python" -m torch.distributed.run --nproc-per-node "${DSMOE_PROCESSES_PER_NODE:-auto}")
if ((${SLURM_NNODES:-1} > 1)); then
  read -r head_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node must not meet
  command=(
    srun --nodes "$SLURM_NNODES" --ntasks "$SLURM_NNODES" --ntasks-per-node 1 --kill-on-bad-exit=1
    # srun does not take this over from sbatch
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task "$SLURM_CPUS_PER_TASK"}
    "${torchrun[@]}" --nnodes "$SLURM_NNODES"
    --rdzv-backend c10d --rdzv-endpoint "$head_node:$port" --rdzv-id "$SLURM_JOB_ID"
  )
else
  command=("${torchrun[@]}" --standalone)
fi
command+=(-m "${verb[@]}")

if [[ -n ${DSMOE_DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
exec "${command[@]}"
