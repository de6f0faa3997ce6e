#!/usr/bin/env bash
# An environment with another release of transformers, and everything else of an existing one by links:
#   tests/hf/install_transformers.sh VENV NEW RELEASE
set -euo pipefail
venv=$(realpath "$1") new=$2 release=$3

"$venv/bin/python" -m venv --clear "$new"
from=$(echo "$venv"/lib/python3.*/site-packages) to=$(echo "$(realpath "$new")"/lib/python3.*/site-packages)
for item in "$from"/*; do
  case $(basename "$item") in
    # What asks for one release of transformers or of its hub client, and pip itself.
    transformers* | tokenizers* | huggingface_hub* | datasets* | trl* | peft* | pip*) ;;
    *) ln -sfn "$item" "$to/" ;;
  esac
done
"$new/bin/pip" install --quiet "transformers==$release" 2> >(grep -v "dependency resolver\|requires" >&2)
