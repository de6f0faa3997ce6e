#!/usr/bin/env bash
# usage: launch/install_gpu.sh [PYTHON]    Installs Transformer Engine for the torch of a Python, by default the checkout's .venv.
# Takes the extra gpu-cu12 or gpu-cu13 of pyproject.toml, by torch's CUDA, and leaves torch as it is. PyPI has the PyTorch part
# as source alone: 33 C++ files without kernels, 17 minutes of CPU time; it needs the CUDA toolkit's headers (CUDA_HOME). A
# folder TE_WHEELS with a wheel of it for this Python and torch saves the build, and afterwards holds the one that was built.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
python=${1:-$home/.venv/bin/python}
wheels=${TE_WHEELS:-$home/.wheels}

pip() { "${PIP_PYTHON:-$python}" -m pip --python "$python" "$@"; }

cuda=$("$python" -c 'import torch; print((torch.version.cuda or "").partition(".")[0])' 2> /dev/null) ||
  { echo "error: $python has no torch that loads: install the one for your CUDA first" >&2; exit 2; }
[ -n "$cuda" ] || { echo "error: $python has a torch for CPUs: install the one for your CUDA first" >&2; exit 2; }
mapfile -t wanted < <("$python" - "$home/pyproject.toml" "gpu-cu$cuda" << 'END'
import sys, tomllib
print(*tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"][sys.argv[2]], sep="\n")
END
)
pip install --quiet --no-deps "${wanted[@]}"  # without dependencies, so that torch stays as it is

part=$(printf '%s\n' "${wanted[@]}" | sed -n 's/^transformer-engine==/transformer-engine-torch==/p')
if ! pip install --quiet --no-deps --no-index --find-links "$wheels" "$part" 2> /dev/null; then
  echo "building $part: some 17 minutes of CPU time"
  pip install --quiet --no-deps setuptools wheel ninja pybind11 packaging
  nvidia=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1] / "nvidia")')
  includes=$(printf '%s:' "$nvidia"/*/include)
  PATH="$(dirname "$python"):$PATH" MAX_JOBS=${MAX_JOBS:-$(nproc)} NVTE_PYTORCH_FORCE_BUILD=TRUE \
  CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} CUDNN_PATH=$nvidia/cudnn CPATH=$includes${CPATH:-} \
  LIBRARY_PATH=$nvidia/cudnn/lib:$nvidia/cu$cuda/lib:${LIBRARY_PATH:-} \
    pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$wheels" "$part"
  pip install --quiet --no-deps --no-index --find-links "$wheels" "$part"
fi
"$python" -c "import torch, transformer_engine.pytorch" 2> /dev/null ||
  { echo "error: Transformer Engine does not load: \`bft-megatron doctor\` says why" >&2; exit 1; }
echo "installed ${wanted[*]} $part"
