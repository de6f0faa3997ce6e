#!/usr/bin/env bash
# usage: install.sh VENV TARGET    Transformer Engine in a virtual environment TARGET, on top of the packages of VENV.
# Apart, since Megatron computes with it wherever it can import it. Imports without a GPU; the libraries come with torch.
set -euo pipefail
venv=${1:?VENV}; target=${2:?TARGET}
home=$(cd "$(dirname "$0")/../.." && pwd)

"$home/tests/versions/environment.sh" "$venv" "$target"
PIP_PYTHON="$venv/bin/python" exec "$home/launch/install_gpu.sh" "$target/bin/python"
