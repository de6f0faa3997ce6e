#!/usr/bin/env bash
#SBATCH --job-name=bft-70b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Llama 3.1 70B on 8 nodes of 8 GPUs. Everything can be set from the command line:
#   sbatch launch/bft_70b.sh
#   sbatch --nodes=4 --time=8:00:00 launch/bft_70b.sh parallel.context=1 data.seq_length=4096 output=runs/b
#   CONTAINER_IMAGE=/images/bft.sqsh sbatch launch/bft_70b.sh
#   PREPARE=1 launch/bft_70b.sh --account=mine train.lr=1e-5     # packs the data in a CPU job first
# Ten minutes before the time limit the run saves and the job is requeued, until it is done: see lib.sh.
set -uo pipefail
# The job runs a copy of this file, so the checkout is found by the folder that sbatch was called in.
BFT_SCRIPT=${BASH_SOURCE[0]}
: "${BFT_HOME:=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$BFT_SCRIPT")/.." && pwd)}}"
[ -r "$BFT_HOME/launch/lib.sh" ] || { echo "call sbatch in the checkout's folder, or set BFT_HOME" >&2; exit 2; }
# shellcheck source=launch/lib.sh
. "$BFT_HOME/launch/lib.sh"
main "${RECIPE:-recipes/llama31_70b.yaml}" "$@"
