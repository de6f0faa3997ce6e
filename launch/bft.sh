#!/usr/bin/env bash
#SBATCH --job-name=bft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Any recipe:  sbatch --nodes=2 launch/bft.sh RECIPE.yaml [KEY=VALUE ...]
# Further settings: bft_70b.sh, lib.sh.
set -uo pipefail
# The job runs a copy of this file, so the checkout is found by the folder that sbatch was called in.
BFT_SCRIPT=${BASH_SOURCE[0]}
: "${BFT_HOME:=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$BFT_SCRIPT")/.." && pwd)}}"
[ -r "$BFT_HOME/launch/lib.sh" ] || { echo "call sbatch in the checkout's folder, or set BFT_HOME" >&2; exit 2; }
# When the script is called itself, sbatch's options may precede or follow the recipe.
options=()
while [[ ${1:-} == -* ]]; do options+=("$1"); shift; done
recipe=${1:?sbatch launch/bft.sh RECIPE.yaml [KEY=VALUE ...]}
shift
export BFT_TAKES_RECIPE=1
# shellcheck source=launch/lib.sh
. "$BFT_HOME/launch/lib.sh"
main "$recipe" "${options[@]}" "$@"
