#!/usr/bin/env bash
# Train DS-MoE-1B with the paper's set-up. Further arguments override the recipe (--train.steps 2).
#   bash launchers/pretrain_1b.sh                  every device of this machine
#   sbatch launchers/pretrain_1b.sh                1 node of 8 GPUs
#   torchrun [...] launchers/pretrain_1b.sh        a layout of processes of your own
# torchrun reads it with Python, to which the bash half is a string; to bash the Python half is an unused here-document.
#SBATCH --job-name=dsmoe-1b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=2-00:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
""":"
set -euo pipefail
recipe=dsmoe_1b
# sbatch runs a copy of this file from the node's spool: $0 is then not in the repository
places=("$(dirname "$0")/..")
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  job=$(scontrol show job "$SLURM_JOB_ID" 2> /dev/null || true)
  if [[ $job =~ Command=([^[:cntrl:]]*)/launchers/pretrain_ ]]; then places+=("${BASH_REMATCH[1]}"); fi
fi
directory=${SLURM_SUBMIT_DIR:-}
while [[ $directory == */* ]]; do
  places+=("$directory")
  directory=${directory%/*}
done
if [[ -n ${DSMOE_ROOT:-} ]]; then places=("$DSMOE_ROOT"); fi
for place in "${places[@]}"; do
  if [[ -f $place/launchers/launch.sh ]]; then exec bash "$place/launchers/launch.sh" "$recipe" "$@"; fi
done
echo "error: no launchers/launch.sh in ${places[*]}; set DSMOE_ROOT to the repository" >&2
exit 2
# shellcheck disable=SC2317 # never run: the lines below are Python's
: <<'# end of python'
":"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed

from dsmoe_megatron.__main__ import main

if __name__ == "__main__":  # a checkpoint's writer processes import this file again
    sys.exit(main(["pretrain", "--config", str(ROOT / "launchers/recipes/dsmoe_1b.yaml"), *sys.argv[1:]]))
# end of python
