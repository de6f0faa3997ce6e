"""Left out where Megatron-Bridge is not installed, as in `make test`; `make test-bridge` installs it apart."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("megatron.bridge") else ["test_*.py"]
