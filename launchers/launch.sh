#!/usr/bin/env bash
# Start `dsmoe_megatron pretrain` with torchrun, on this machine or on every node of a SLURM job (docs/slurm.md).
#   launch.sh RECIPE [--section.key VALUE ...]     RECIPE is a name in launchers/recipes
# Environment; launchers/site.env, if there is one, is read first (site.env.example):
#   DSMOE_PROCESSES_PER_NODE         default: one per GPU, or per core where there is none
#   DSMOE_PYTHON                     default: the repository's .venv, else python3
#   DSMOE_CONTAINER                  words that start Python in a container
#   DSMOE_SITE                       another file than launchers/site.env
#   DSMOE_RESTARTS_WITHOUT_PROGRESS  how often in a row a batch job is requeued without a new checkpoint; default: 2
#   DSMOE_DRY_RUN=1                  check the recipe, print the command and stop
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
recipe=$root/launchers/recipes/$1.yaml
shift
# shellcheck source=launchers/settings.sh
source "$root/launchers/settings.sh"
arguments=(--config "$recipe" "$@")

case " $* " in
  *" -h "* | *" --help "* | *" --print_config"*) exec "${python[@]}" -m dsmoe_megatron pretrain "${arguments[@]}" ;;
esac

is_batch_job=""
# sbatch sets ENVIRONMENT, salloc does not; a check trains nothing that could go on
if [[ -n ${SLURM_JOB_ID:-} && ${ENVIRONMENT:-} == BATCH && ! " $* " =~ " --check"[\ =] ]]; then
  is_batch_job=yes
  # shellcheck source=launchers/batch_job.sh
  source "$root/launchers/batch_job.sh"
fi

# Set step, steps and run_dir from the recipe and what lies in its run folder
read_progress() {
  local line
  line=$("${python[@]}" -m dsmoe_megatron progress "${arguments[@]}")
  read -r _ step _ steps _ run_dir <<< "$line" # "step 20 of 100 in RUN_DIR"
}
# one process reads the recipe first: a mistake is then said once, not by every process and torchrun
read_progress

torchrun=(-m torch.distributed.run --nproc-per-node "${DSMOE_PROCESSES_PER_NODE:-auto}")
nodes=${SLURM_NNODES:-1}
if ((nodes > 1)); then
  read -r head_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # neither jobs that share a node nor the starts of one job must meet
  restarts=${SLURM_RESTART_COUNT:-0}
  port=$((20000 + (SLURM_JOB_ID + 1009 * restarts) % 10000))
  torchrun+=(
    --nnodes "$nodes"
    --rdzv-backend c10d --rdzv-endpoint "$head_node:$port" --rdzv-id "$SLURM_JOB_ID.$restarts"
  )
else
  torchrun+=(--standalone)
fi
torchrun+=(-m dsmoe_megatron pretrain "${arguments[@]}")

# a shell of salloc is on the login node unless the site has it start in a step
is_outside_the_allocation=""
if [[ -n ${SLURM_JOB_ID:-} && ${ENVIRONMENT:-} != BATCH && -z ${SLURM_STEP_ID:-} ]]; then
  is_outside_the_allocation=yes
fi
if [[ -n $is_batch_job || -n $is_outside_the_allocation ]] || ((nodes > 1)); then
  command=(
    srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=1
    # srun does not take this over from sbatch
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task "$SLURM_CPUS_PER_TASK"}
    bash "$root/launchers/on_node.sh" "${torchrun[@]}"
  )
else
  command=("${python[@]}" "${torchrun[@]}")
fi

if [[ -n ${DSMOE_DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
if [[ -z $is_batch_job ]]; then exec "${command[@]}"; fi
train_in_batch_job "${command[@]}"
