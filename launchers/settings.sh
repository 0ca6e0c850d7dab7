# shellcheck shell=bash
# Sourced by launch.sh and on_node.sh, which set root: the site's settings, then the defaults of what they leave open.
site=${DSMOE_SITE:-$root/launchers/site.env}
if [[ -r $site ]]; then
  set +eu # modules and other people's scripts
  # shellcheck source=/dev/null
  source "$site"
  set -eu
elif [[ -n ${DSMOE_SITE:-} ]]; then
  echo "error: DSMOE_SITE = $site: no such file" >&2
  exit 2
fi

python=${DSMOE_PYTHON:-$root/.venv/bin/python}
if [[ ! -x $python && -z ${DSMOE_PYTHON:-} ]]; then python=python3; fi
read -ra container <<< "${DSMOE_CONTAINER:-}"
python=(${container[@]+"${container[@]}"} "$python")

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # found without an installation, whatever the working directory
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun hands these on, and then gives the ranks this long [s] to finish a step and save before it kills them
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-600}
