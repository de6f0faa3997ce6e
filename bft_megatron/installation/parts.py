"""The parts that a run on a GPU computes with: their versions, whether they fit, and what a missing one costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bft_megatron.installation import driver
from bft_megatron.installation.layers import (
    INSTALL,
    WITHOUT_FLASH_LINEAR_ATTENTION,
    WITHOUT_TRANSFORMER_ENGINE,
    transformer_engine_is_there,
)


@dataclass(frozen=True)
class Part:
    """A part, and what is to be said of it."""

    name: str
    found: str
    """Its version, or `missing`."""
    state: Literal["good", "missing", "wrong"]
    """missing: a run goes on without it, more slowly. wrong: a run on a GPU ends, or the part is not used."""
    says: str = ""
    """Its cost where it is missing or wrong, and the way to mend it."""


def version(distribution: str) -> str | None:
    """Return the version of an installed distribution; None: it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def import_error(modules: str) -> str | None:
    """Import modules in a process of their own, and return the last line of its error; None: they import."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {modules}"], capture_output=True, text=True, timeout=300, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return None if done.returncode == 0 else (lines or [f"status {done.returncode}"])[-1].strip()


def packages() -> list[Part]:
    """Return the packages whose releases matter, torch only where its release is not one that is asked for."""
    try:
        asked = {r.name: r.specifier for r in map(Requirement, importlib.metadata.requires("bft-megatron") or ())}
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
        asked = {}
    found = []
    for name in ("torch", "megatron-core", "transformers", "datasets"):
        release, wanted = version(name) or "missing", asked.get(name, SpecifierSet())
        if release == "missing" or not wanted.contains(release, prereleases=True):
            says = f'is not of the releases that this one works with: pip install "{name}{wanted}"'
            found.append(Part(name, release, "wrong", says))
        elif name != "torch":
            found.append(Part(name, release, "good"))
    return found


def torch_and_driver() -> list[Part]:
    """Return torch, and the driver that it needs."""
    import torch

    built, newest = torch.version.cuda, driver.newest_cuda()
    if built is None:
        says = "built for CPUs: install the build for your CUDA from https://pytorch.org"
        return [Part("torch", torch.__version__, "wrong", says)]
    part = Part("torch", f"{torch.__version__}, for CUDA {built}", "good")
    if newest is None:
        says = "no NVIDIA driver: runs are on the CPU, with `device=cpu`"
        return [part, Part("driver", "missing", "missing", says)]
    shown = f"{driver.release() or 'unknown release'}, up to CUDA {newest[0]}.{newest[1]}"
    if newest[0] < int(built.split(".")[0]):
        says = f"too old for torch's CUDA {built}: update the driver, or install torch for CUDA {newest[0]}"
        return [part, Part("driver", shown, "wrong", says)]
    return [part, Part("driver", shown, "good")]


def gpus() -> list[Part]:
    """Return the GPUs, each kind once, and how they are linked."""
    import torch

    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or count == 0:
        return [Part("GPUs", "none", "missing", "torch sees no GPU on this machine")]
    found = []
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        built_for = f"sm_{gpu.major}{gpu.minor}" in torch.cuda.get_arch_list() or gpu.major >= 8
        shown = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
        says = "" if built_for else "this torch has no kernels for it: bf16 needs sm_80 or newer"
        found.append(Part("GPU", shown, "good" if built_for else "wrong", says))
    kinds = list(dict.fromkeys(found))
    links = driver.links()
    if count > 1 and not any(kind.startswith("NV") for kind in links):
        says = "no NVLink between GPUs: prefer parallel.data and parallel.pipeline to parallel.tensor"
        return [*kinds, Part("links", f"{count} GPUs, {', '.join(sorted(links)) or 'unknown'}", "missing", says)]
    return [*kinds, *([Part("links", f"{count} GPUs, {', '.join(sorted(links))}", "good")] if count > 1 else [])]


def nccl() -> Part:
    """Return NCCL, which ranks on GPUs talk by."""
    import torch

    if not torch.distributed.is_nccl_available():
        return Part("NCCL", "missing", "wrong", "this torch was built without it: ranks on GPUs cannot talk")
    return Part("NCCL", ".".join(map(str, torch.cuda.nccl.version())), "good")


def transformer_engine() -> Part:
    """Return Transformer Engine: its core's and its PyTorch part's versions, and whether it loads."""
    name = "Transformer Engine"
    core = next((d for d in ("transformer-engine-cu13", "transformer-engine-cu12") if version(d)), None)
    whole, torch_part = version("transformer-engine"), version("transformer-engine-torch")
    if not transformer_engine_is_there():
        return Part(name, "missing", "missing", f"{WITHOUT_TRANSFORMER_ENGINE}: {INSTALL} installs it")
    shown = whole or torch_part or (version(core) if core else None) or "unknown version"
    if error := import_error("torch, transformer_engine.pytorch"):
        return Part(name, shown, "wrong", f"does not load ({error}): {INSTALL} builds it for this torch")
    return Part(name, shown, "good")


def apex() -> Part:
    """Return apex, by its kernels: PyPI has another project of that name."""
    cost = "gradients of weights are added in a pass of their own"
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None:
        return Part("apex", version("apex") or "unknown version", "good")
    if version("apex") is None:
        says = f"{cost}; build it from https://github.com/NVIDIA/apex, never `pip install apex`"
        return Part("apex", "missing", "missing", says)
    says = f"without its kernels, or PyPI's project of the same name: uninstall it; {cost}"
    return Part("apex", str(version("apex")), "wrong", says)


def kernels() -> list[Part]:
    """Return the packages whose kernels are used where they are there."""
    from bft_megatron.layers import flash

    attention = Part("flash attention", "torch's", "good")
    if not flash.is_there():
        says = "torch before 2.11: attention runs a sample at a time; install a newer torch"
        attention = Part("flash attention", "missing", "missing", says)
    wanted = {
        "triton": "the head's Triton kernels (objective.kernels: triton) and compiled code need it: pip install triton",
        "flash-linear-attention": WITHOUT_FLASH_LINEAR_ATTENTION,
    }
    found = [(name, version(name), says) for name, says in wanted.items()]
    return [attention, *(Part(n, v or "missing", "good" if v else "missing", "" if v else s) for n, v, s in found)]


def everything() -> list[Part]:
    """Return all parts, in the order in which they build on each other."""
    python = Part("python", sys.version.split()[0], "good")
    return [python, *torch_and_driver(), *gpus(), nccl(), *packages(), transformer_engine(), apex(), *kernels()]
