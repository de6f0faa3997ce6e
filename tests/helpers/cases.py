"""Layouts and objectives to run: some chosen by hand, the rest drawn from all that eight processes can hold."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from tests.helpers.runs import HYBRID, Case, Layout

OWN = "examples.objectives.group_normalised:record"
MOST_PROCESSES = 8
SEED = int(os.environ.get("SEED", "0"))
"""What is drawn follows from it; `make` takes the day."""

OBJECTIVES = [
    Case("bft"),
    Case("sft"),
    Case("dft"),
    Case(OWN),
    Case("bft", "tokens", "arithmetic"),
    Case("sft", "samples"),
    Case("dft", "samples"),
    Case("power", options="{alpha: 0.5}"),
    Case("threshold", options="{q: 0.002}"),  # half of the tokens, where weights are drawn
    Case("focal", options="{gamma: 2}"),
]
"""The list of records, ours and one of a user's, with both divisors: whoever adds one is held to it on every layout."""

MIXTURES = ("qwen3_moe", "qwen3_moe_dense", "qwen2_moe", "mixtral", "hunyuan", "glm")
"""Those of `runs.VARIANTS` that have experts: of every kind of router, with shared experts and dense layers."""

HYBRIDS = ("hybrid", "hybrid_moe", "next")
"""Those that have gated delta nets: without experts, with experts, and with both kinds of feed-forward network."""

CHOSEN = [
    # Padded rows: every dimension alone and together, one and two rows a micro-batch.
    (Case("bft", packing=False), Layout(tensor=2, sequence=True, micro_batch_size=2)),
    (Case("sft", packing=False), Layout(pipeline=2)),
    (Case("bft", "tokens", packing=False), Layout(data=2)),
    (Case("bft", packing=False), Layout(pipeline=2, virtual_pipeline=2, micro_batch_size=2)),
    (Case("bft", packing=False), Layout(context=2, data=2)),
    # Packed rows with true middle stages, which need the samples' edges too.
    (Case("bft"), Layout(pipeline=4)),
    (Case("dft", "samples"), Layout(pipeline=2, virtual_pipeline=2)),
    # Windows that stay within a rank's chunks.
    (Case(OWN, cp_windows="per_rank"), Layout(context=4)),
    # Norms of heads, tied embeddings on two stages, a sliding window: what the tiny Llama has not.
    (Case(model="qwen3"), Layout(tensor=2, pipeline=2, sequence=True)),
    # Mixtures: the experts alone on ranks of their own, and with other dimensions; the other architectures are slow.
    (Case(model="qwen3_moe"), Layout(data=2, expert=2)),
    (Case("sft", model="glm"), Layout(tensor=2, sequence=True, expert=2)),
    # Hybrids: their heads cut by tensor and context parallelism, their layers of two kinds by the pipeline. One
    # objective, so that the slow float64 reference of many short samples is computed once.
    (Case(model="hybrid"), Layout(tensor=2)),
    (Case(model="hybrid"), Layout(pipeline=2, virtual_pipeline=2)),
]

CHOSEN_SLOW = [
    (Case("power", options="{alpha: 0.5}"), Layout(tensor=2, pipeline=2, virtual_pipeline=2)),
    (Case("focal", options="{gamma: 2}", packing=False), Layout(tensor=2, context=2)),
    (Case("bft", cp_windows="per_rank"), Layout(tensor=2, context=2, sequence=True)),
    (Case(model="qwen3_moe"), Layout(tensor=2, data=2, sequence=True, expert=2, expert_tensor=2)),
    (Case(model="hunyuan"), Layout(pipeline=2, virtual_pipeline=2, data=2, expert=2)),
    (Case(OWN, cp_windows="per_rank"), Layout(pipeline=2, context=2)),
    (Case(model="mistral"), Layout(tensor=2, context=2)),
    (Case(model="hybrid"), Layout(tensor=2, context=2, sequence=True)),
    (Case(packing=False, model="hybrid_moe"), Layout(data=2, expert=2)),
    (Case(model="qwen3", packing=False), Layout(pipeline=2, virtual_pipeline=2)),
    (Case("dft", packing=False), Layout(tensor=2, pipeline=2, micro_batch_size=2)),
    (Case("sft", "samples", packing=False), Layout(tensor=2, data=2, sequence=True)),
    (Case(OWN, packing=False), Layout(tensor=2, pipeline=2, data=2, sequence=True)),
    (Case("bft"), Layout(pipeline=4, context=2)),
    (Case("bft", confidence="arithmetic", cp_windows="per_rank"), Layout(context=4, data=2)),
    (Case(model="mixtral"), Layout(context=2, data=2, expert=4)),
    (Case("sft", packing=False, model="qwen3_moe_dense"), Layout(pipeline=2, data=2, expert=2, micro_batch_size=2)),
    (Case(OWN, model="qwen2_moe"), Layout(tensor=2, sequence=True, expert=2)),  # with biases
    (Case("dft", model="hybrid"), Layout(context=4)),
    (Case(OWN, packing=False, model="hybrid"), Layout(pipeline=2, virtual_pipeline=2, micro_batch_size=2)),
    (Case(model="next"), Layout(tensor=2, sequence=True, expert=2)),
    (Case("dft", packing=False, model="next"), Layout(pipeline=2, data=2, expert=2)),
]
"""More of all three kinds of models, of eight processes or with a reference of their own; the matrix has the rest."""


def every_layout() -> list[Layout]:
    """All layouts of the tiny model (four layers, four heads, two KV heads) over at most eight processes."""
    found = []
    for tensor, pipeline, virtual, context, data in product((1, 2), (1, 2, 4), (1, 2), (1, 2, 4), (1, 2, 4)):
        layout = Layout(tensor, pipeline, virtual, context, data)
        if layout.world > MOST_PROCESSES or pipeline * virtual > 4 or (virtual > 1 and pipeline == 1):
            continue
        if 8 // data % pipeline and virtual > 1:
            continue
        for sequence in (False, True) if tensor > 1 else (False,):
            found.append(replace(layout, sequence=sequence))
    return found


def every_layout_of_experts() -> list[Layout]:
    """All layouts with each expert-parallel and expert-tensor-parallel size that a stage's processes can hold."""
    return [
        replace(layout, expert=expert, expert_tensor=expert_tensor)
        for layout, expert, expert_tensor in product(every_layout(), (1, 2, 4, 8), (1, 2, 4))
        if not layout.world // layout.pipeline % (expert * expert_tensor) and layout.sequence == (layout.tensor > 1)
    ]


def dense_cases() -> list[tuple[Case, Layout]]:
    """Every layout with every objective, packed and padded, and both kinds of windows where they differ."""
    return _cases(every_layout(), ["tiny"])


def mixture_cases() -> list[tuple[Case, Layout]]:
    """The same of every mixture on every layout of its experts."""
    return _cases(every_layout_of_experts(), MIXTURES)


def hybrid_cases() -> list[tuple[Case, Layout]]:
    """The same of every hybrid, those with experts on every layout of their experts, where heads can be cut so."""
    found = _cases(every_layout(), ["hybrid"]) + _cases(every_layout_of_experts(), ["hybrid_moe", "next"])
    heads = HYBRID["linear_num_key_heads"]
    return [pair for pair in found if heads % (pair[1].tensor * pair[1].context) == 0]


def every_kind_of_cases() -> tuple[list[tuple[Case, Layout]], ...]:
    """The cases by kind of model, of which a draw takes equal parts: most of all cases are mixtures."""
    return dense_cases(), mixture_cases(), hybrid_cases()


def _cases(layouts: Sequence[Layout], models: Sequence[str]) -> list[tuple[Case, Layout]]:
    found = []
    for layout, model, objective, packing in product(layouts, models, OBJECTIVES, (True, False)):
        for windows in ("exact", "per_rank") if layout.context > 1 else ("exact",):
            found.append((replace(objective, cp_windows=windows, packing=packing, model=model), layout))
    return found


def drawn(count: int) -> list[tuple[Case, Layout]]:
    """`count` others than CHOSEN by SEED, as many of each kind, those of fewer processes likelier for a short run."""
    rng, found, kinds = random.Random(SEED), [], every_kind_of_cases()
    for cases in kinds:
        pool = [pair for pair in cases if pair not in CHOSEN + CHOSEN_SLOW]
        found += sorted(pool, key=lambda pair: rng.random() ** pair[1].world, reverse=True)[: count // len(kinds)]
    return found
