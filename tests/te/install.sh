#!/usr/bin/env bash
# usage: install.sh VENV TARGET    Transformer Engine in a virtual environment TARGET, on top of the packages of VENV.
# Apart, since Megatron computes with it wherever it can import it. Imports without a GPU; the libraries come with torch.
# Its PyTorch extension is a source package: 17 minutes of CPU time to build (33 C++ files, no kernels; it needs the CUDA
# toolkit's headers, CUDA_HOME), unless the folder TE_WHEELS holds a wheel of it for this Python and torch.
set -euo pipefail
venv=${1:?VENV}; target=${2:?TARGET}; version=2.20.2

site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
pip() { "$venv/bin/python" -m pip --python "$target/bin/python" install --quiet --no-deps "$@"; }

rm -rf "$target"
"$venv/bin/python" -m venv --without-pip "$target"
base=$(site "$venv"); own=$(site "$target")
echo "import site; site.addsitedir('$base')" > "$own/base.pth"
ln -s "$base/nvidia" "$own/nvidia"  # where Transformer Engine looks for the CUDA libraries

pip "transformer-engine==$version" "transformer-engine-cu13==$version" \
  onnxscript==0.7.2 onnx==1.23.2 onnx-ir==1.1.0 ml-dtypes==0.6.0 einops==0.8.2 nvdlfw-inspect==0.2.2
if [ -z "${TE_WHEELS:-}" ] || ! pip --no-index --find-links "$TE_WHEELS" "transformer-engine-torch==$version"; then
  echo "building transformer-engine-torch $version: some 17 minutes of CPU time"
  pip setuptools wheel ninja pybind11 packaging
  nvidia=$base/nvidia
  PATH="$target/bin:$PATH" MAX_JOBS=$(nproc) NVTE_PYTORCH_FORCE_BUILD=TRUE CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} \
  CUDNN_PATH=$nvidia/cudnn CPATH=$nvidia/cudnn/include:$nvidia/nccl/include:$nvidia/cu13/include:$nvidia/nvshmem/include \
  LIBRARY_PATH=$nvidia/cudnn/lib:$nvidia/cu13/lib \
    pip --no-build-isolation "transformer-engine-torch==$version"
fi
"$target/bin/python" -c "import torch, transformer_engine.pytorch" 2> /dev/null
