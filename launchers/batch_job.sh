# shellcheck shell=bash
# Sourced by launch.sh in a batch job of SLURM: what becomes of the job when its ranks have ended (docs/slurm.md).
#   train_in_batch_job SRUN...    uses read_progress of launch.sh and what that sets
# shellcheck disable=SC2154 # step, steps, run_dir
stop=""
trap 'stop=USR1' USR1 # the time limit is near (#SBATCH --signal)
trap 'stop=TERM' TERM # scancel, preemption, a lost node; SLURM has sent it to the ranks itself
trap 'stop=INT' INT

say() { echo "launch.sh: job $SLURM_JOB_ID: $*" >&2; }

train_in_batch_job() {
  local step_at_start=$step code=0 fault=$run_dir/slurm_fault_$SLURM_JOB_ID state
  mkdir -p "$run_dir"
  rm -f "$fault"
  run_until_end env DSMOE_FAULT_FILE="$fault" "$@" || code=$?

  read_progress
  if ((step >= steps)); then
    rm -f "$run_dir/slurm_restarts"
    say "finished: $steps steps"
    exit 0
  fi
  if [[ -s $fault ]]; then
    rm "$fault" # its line has been printed
    say "at step $step of $steps; not requeued: the error above does not go away by itself"
    exit 1
  fi
  if [[ $stop == INT ]]; then
    say "stopped at step $step of $steps by SIGINT; not requeued"
    exit 0
  fi
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
  if [[ $state != RUNNING ]]; then # cancelled, out of time, or requeued by SLURM itself
    say "at step $step of $steps; SLURM has ended the job (${state:-unknown})"
    exit 1
  fi
  if [[ -z $stop ]] && ((code)); then say "srun ended with exit code $code"; fi
  requeue "$step_at_start"
}

# Run a command; a signal to this script is handed on until the command ends
run_until_end() {
  "$@" &
  local srun=$!
  while kill -0 "$srun" 2> /dev/null; do
    # srun passes it to the ranks; again and again, since they do not listen while they load
    if [[ -n $stop ]]; then kill -USR1 "$srun" 2> /dev/null || true; fi
    sleep 2 # not wait, which would miss a signal that comes just before it
  done
  wait "$srun"
}

# Give the job back to the queue, unless it has been there too often without a new checkpoint
requeue() {
  local limit=${DSMOE_RESTARTS_WITHOUT_PROGRESS:-2} record=$run_dir/slurm_restarts job="" count=0
  if [[ -r $record ]]; then read -r job count < "$record" || true; fi
  if [[ $job != "$SLURM_JOB_ID" ]]; then count=0; fi
  if ((step > $1)); then count=0; else count=$((count + 1)); fi
  if ((count > limit)); then
    say "no checkpoint after step $step in $count starts in a row; not requeued"
    exit 1
  fi
  echo "$SLURM_JOB_ID $count" > "$record"
  say "requeued at step $step of $steps"
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    say "it could not be requeued; the same sbatch command goes on from step $step"
    exit 1
  fi
  exit 0
}
