#!/bin/sh
# Print a Python 3.12 or 3.13, 3.12 first: one on the PATH, pyenv's, uv's. Says how to get one where there is none.
is() { "$2" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; }

for version in 3.12 3.13; do
  for candidate in "python$version" python3 python; do
    if is "$version" "$candidate"; then command -v "$candidate"; exit 0; fi
  done
  if command -v pyenv >/dev/null; then
    for release in $(pyenv versions --bare 2>/dev/null | grep "^$version\." | sort -rV); do
      candidate="$(pyenv root)/versions/$release/bin/python"
      if is "$version" "$candidate"; then echo "$candidate"; exit 0; fi
    done
  fi
  if command -v uv >/dev/null && candidate=$(uv python find "$version" 2>/dev/null) && is "$version" "$candidate"; then
    echo "$candidate"; exit 0
  fi
done

cat >&2 <<'HELP'
Python 3.12 or 3.13 is needed and was not found. Any of these brings it:
  uv python install 3.12
  pyenv install 3.12
  apt install python3.12 python3.12-venv     (or your system's package of that name)
HELP
exit 1
