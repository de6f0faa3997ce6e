"""`bft-megatron plan`: from the command line's words to a printed plan. Imports torch where it is first needed."""

from __future__ import annotations

import json
import logging
import os
import warnings

from rich.console import Console

from bft_megatron.checks import model_parallel_size
from bft_megatron.hf.architectures import ModelConfig
from bft_megatron.plan.hardware import Cluster, lookup
from bft_megatron.recipe import Recipe


def cluster(recipe: Recipe, nodes: int | None, gpus_per_node: int, gpu: str) -> Cluster:
    """The cluster that the options name; without nodes, as few as hold the model once, or what a run on the CPU starts.

    Raises:
        UserError: there is no such GPU.
    """
    one_copy = model_parallel_size(recipe)
    if nodes is None and recipe.device == "cpu":
        world = one_copy * recipe.parallel.data
    else:
        world = (nodes or -(-one_copy // gpus_per_node)) * gpus_per_node
    return Cluster(lookup(gpu), world, gpus_per_node)


def run(recipe: Recipe, config: ModelConfig, on: Cluster, *, as_json: bool) -> bool:
    """Plan and print; returns whether the recipe fits.

    Raises:
        UserError: Megatron refuses the recipe.
    """
    quietly()
    from bft_megatron.plan import report
    from bft_megatron.plan.plan import plan

    made = plan(recipe, config, on)
    if as_json:
        print(json.dumps(report.as_json(made), indent=2))
    else:
        report.show(made, Console())
    return made.verdict.fits


def quietly() -> None:
    """Before torch and Megatron are imported: claim no GPU, and don't say what is missing on this machine."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
