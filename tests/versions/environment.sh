#!/usr/bin/env bash
# usage: environment.sh VENV TARGET REQUIREMENT...    A virtual environment TARGET: the packages of VENV, and before them those
# that are named, without what they depend on. torch brings the Triton that it was released with. A fifth of a minute for torch,
# since CUDA's libraries are VENV's.
set -euo pipefail
venv=${1:?VENV}; target=${2:?TARGET}; shift 2

site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
install() { "$venv/bin/pip" --python "$target/bin/python" install --quiet --no-deps "$@"; }

rm -rf "$target"
"$venv/bin/python" -m venv --without-pip "$target"
base=$(site "$venv"); own=$(site "$target")
echo "import site; site.addsitedir('$base')" > "$own/base.pth"
ln -s "$base/nvidia" "$own/nvidia"  # where torch and Transformer Engine look for CUDA's libraries
[ $# = 0 ] || install "$@"
if [ -d "$own/torch" ]; then
  install "$("$target/bin/python" -c 'import importlib.metadata as m
print(next(r.partition(";")[0] for r in m.requires("torch") if r.startswith("triton")))')"
fi
