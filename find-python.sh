#!/bin/sh
# Print a Python 3.12: python3.12 on the PATH, python3 if it is one, pyenv's, uv's. Says how to get one where there is none.
is_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }

for candidate in python3.12 python3 python; do
  if is_312 "$candidate"; then command -v "$candidate"; exit 0; fi
done
if command -v pyenv >/dev/null; then
  for version in $(pyenv versions --bare 2>/dev/null | grep '^3\.12' | sort -rV); do
    candidate="$(pyenv root)/versions/$version/bin/python"
    if is_312 "$candidate"; then echo "$candidate"; exit 0; fi
  done
fi
if command -v uv >/dev/null && candidate=$(uv python find 3.12 2>/dev/null); then echo "$candidate"; exit 0; fi

cat >&2 <<'HELP'
Python 3.12 is needed and was not found. Any of these brings it:
  uv python install 3.12
  pyenv install 3.12
  apt install python3.12 python3.12-venv     (or your system's package of that name)
HELP
exit 1
