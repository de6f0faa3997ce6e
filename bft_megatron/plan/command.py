"""The work of `bft-megatron plan`, from its options to a printed plan. Imports torch where it is first needed."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from pathlib import Path

from bft_megatron.commands.request import Request
from bft_megatron.plan.hardware import Cluster, lookup, share_of_this_machine
from bft_megatron.plan.known import model_config
from bft_megatron.recipe import layout_rules, reader
from bft_megatron.recipe.schema import Recipe


def read(file: Path, overrides: list[str] | None) -> Request:
    """Read and check a recipe; neither the model's files nor the run's folder need to be on this machine.

    Raises:
        UserError: the first fault, with its file, line and field.
    """
    recipe = reader.load(file, overrides or [])
    request = Request(file, overrides or [], recipe, model_config(recipe.model))
    request.check_fields()
    return request


def cluster(recipe: Recipe, nodes: int | None, gpus_per_node: int, gpu: str) -> Cluster:
    """Return the cluster that the options describe; by default as few nodes as hold the model once.

    For a CPU run it is this machine.

    Raises:
        UserError: the GPU is unknown.
    """
    one_copy = math.lcm(recipe.parallel.model_parallel_size, recipe.parallel.expert_model_parallel_size)
    if recipe.device == "cpu":
        world = one_copy * recipe.parallel.data
        return Cluster(share_of_this_machine(world), world, world)
    world = (nodes or -(-one_copy // gpus_per_node)) * gpus_per_node
    return Cluster(lookup(gpu), world, gpus_per_node)


def run(request: Request, on: Cluster, load: float, *, as_json: bool, html: Path | None) -> bool:
    """Make and print a plan, with the changes that would help if it does not fit; return whether it fits.

    Raises:
        UserError: the recipe does not divide over the cluster, or Megatron refuses it.
    """
    recipe, config = request.recipe, request.config
    request.check(lambda: layout_rules.check_world(recipe, on.world))
    quietly()
    from bft_megatron.plan import report
    from bft_megatron.plan.changes import changes
    from bft_megatron.plan.page import page
    from bft_megatron.plan.plan import plan

    made, console = request.check(lambda: plan(recipe, config, on, load, compare=True)), report.console()
    helps = [] if made.verdict.fits else changes(recipe, config, on, made.verdict.stage, load)
    if as_json:
        print(json.dumps(report.as_json(made, helps), indent=2))
    else:
        report.show(made, console)
        if not made.verdict.fits:
            report.show_changes(helps, console)
    if html is not None:
        html.write_text(page(made))
    return made.verdict.fits


def search(request: Request, on: Cluster, load: float, *, as_json: bool) -> bool:
    """Rank and print the layouts of the cluster's GPUs; return whether one fits."""
    quietly()
    from bft_megatron.plan import report
    from bft_megatron.plan.search import search

    found = search(request.recipe, request.config, on, load)
    if as_json:
        print(json.dumps([report.as_json(plan, []) for plan in found], indent=2))
    else:
        report.show_layouts(found, report.console())
    return any(plan.verdict.fits for plan in found)


def quietly() -> None:
    """Hide the GPUs and silence warnings of missing libraries; to be called before torch and Megatron are imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
