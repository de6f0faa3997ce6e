#!/usr/bin/env bash
# usage: install.sh VENV TARGET    Megatron-Bridge with Transformer Engine in an environment TARGET, on VENV's packages.
# Apart, since Bridge needs an older transformers. Without its dependencies but those that a fine-tune imports.
set -euo pipefail
venv=${1:?VENV}; target=${2:?TARGET}
here=$(dirname "$0")

"$here/../te/install.sh" "$venv" "$target"
add() { "$venv/bin/python" -m pip --python "$target/bin/python" install --quiet "$@"; }
add "transformers==5.12.1" "huggingface_hub==1.33.0" "nvidia-modelopt==0.47.0" "pulp==2.9.0" "megatron-energon==7.4.1" \
  "diffusers==0.42.1"
add --no-deps "megatron-bridge==0.6.2" "defusedxml==0.7.1"
# Its wheel asks for a newer libc than many systems have; what Bridge imports of it is Python.
own=$("$target/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$venv/bin/python" -m pip install --quiet --target "$own" --no-deps --only-binary=:all: --python-version 3.12 \
  --platform manylinux_2_39_x86_64 "nvidia-resiliency-ext==0.6.0"
"$target/bin/python" -c "import megatron.bridge.training.finetune, megatron.bridge.training.gpt_step"
