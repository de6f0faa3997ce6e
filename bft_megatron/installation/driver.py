"""The NVIDIA driver and the links between GPUs of this machine, without torch."""

from __future__ import annotations

import ctypes
import re
import subprocess


def newest_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA, major and minor, that the driver supports; None: there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0 or version.value == 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def release() -> str:
    """Return the driver's release, or an empty string if nvidia-smi does not tell."""
    return _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0].strip()


def capabilities() -> set[int]:
    """Return ten times the compute capabilities of this machine's GPUs; none if nvidia-smi does not tell."""
    said = _nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader")
    return {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)\b", said, re.MULTILINE)}


def links() -> set[str]:
    """Return the kinds of links between this machine's GPUs in `nvidia-smi topo -m`, such as NV18 or PHB."""
    return topology_links(_nvidia_smi("topo", "-m"))


def topology_links(table: str) -> set[str]:
    """Return the kinds of links in the rows and columns of GPUs of a printed topology."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in table.splitlines()]
    rows = [line[1:] for line in lines if line and re.fullmatch(r"GPU\d+", line[0]) and "X" in line]
    return {cell for row in rows for cell in row[: len(rows)] if cell != "X"}


def _nvidia_smi(*words: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
