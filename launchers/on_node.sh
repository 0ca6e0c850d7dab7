#!/usr/bin/env bash
# What srun starts on each node of a job: Python with the arguments given, under the settings of that node.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launchers/settings.sh
source "$root/launchers/settings.sh"
# SLURM signals every process of a step. USR1 is for the ranks alone, which listen to it as soon as they can
trap '' USR1
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT
exec "${python[@]}" "$@"
