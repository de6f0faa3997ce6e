#!/usr/bin/env bash
# usage: install.sh VENV TARGET    Transformer Engine in a virtual environment TARGET, on top of the packages of VENV.
# Apart, since Megatron computes with it wherever it can import it. Imports without a GPU; the libraries come with torch.
set -euo pipefail
venv=${1:?VENV}; target=${2:?TARGET}

site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

rm -rf "$target"
"$venv/bin/python" -m venv --without-pip "$target"
base=$(site "$venv"); own=$(site "$target")
echo "import site; site.addsitedir('$base')" > "$own/base.pth"
ln -s "$base/nvidia" "$own/nvidia"  # where Transformer Engine looks for the CUDA libraries
PIP_PYTHON="$venv/bin/python" exec "$(dirname "$0")/../../launch/install_gpu.sh" "$target/bin/python"
