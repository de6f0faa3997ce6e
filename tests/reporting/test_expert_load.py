"""The experts' load over all ranks, and the experts that receive nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from bft_megatron.reporting.expert_load import ExpertLoad, dead_experts
from tests.helpers.world import run_world

EVEN = torch.full((4,), 600)
WITHOUT_2 = torch.tensor([900, 900, 0, 600])


def _steps() -> list[tuple[dict[str, Any], dict[int, float], dict[int, list[int]]]]:
    """Of each step on a rank, of which the first holds layer 1 and the second layer 3: what is said of it."""
    load, found = ExpertLoad([1, 3], 4), []
    for of_layer_3 in (WITHOUT_2, EVEN, WITHOUT_2, WITHOUT_2, WITHOUT_2, EVEN, WITHOUT_2, WITHOUT_2):
        for half in (1, 2):  # two micro-batches
            load.add(*((1, half * EVEN) if dist.get_rank() == 0 else (3, half * of_layer_3)))
        load.reduce()
        found.append((load.report(), load.by_layer, load.newly_dead()))
    return found


def test_loads_are_of_all_ranks_and_micro_batches_and_an_expert_that_is_dead_is_named_once():
    first, second = run_world(2, _steps, megatron=True)
    assert first == second
    reports, by_layer, dead = zip(*first, strict=True)
    assert by_layer[:2] == ({1: 1.0, 3: 1.5}, {1: 1.0, 3: 1.0})
    assert reports[0] == {"expert_load": 1.5, "expert_load_layer": 3}
    assert dead == ({3: [2]}, {}, {}, {}, {}, {}, {}, {})


def _quiet_steps() -> list[dict[int, list[int]]]:
    load, found = ExpertLoad([0], 2), []
    for counts in ((400, 0), (400, 0), (400, 1), (400, 0), (1600, 0), (9000, 0)):
        load.add(0, torch.tensor(counts))
        load.reduce()
        found.append(load.newly_dead())
    return found


def test_an_expert_is_dead_once_its_layer_has_sent_a_thousand_tokens_to_each_without_it():
    (found,) = run_world(1, _quiet_steps, megatron=True)
    assert found == [{}, {}, {}, {}, {0: [1]}, {}]
    assert dead_experts({0: [1], 2: [3, 4]}).endswith("layer 0: 1; layer 2: 3, 4")


def _nothing() -> dict[int, float]:
    load = ExpertLoad([0], 2)
    load.reduce()
    return load.by_layer


def test_a_step_without_tokens_has_a_load_all_the_same():
    assert run_world(1, _nothing, megatron=True) == [{0: 0.0}]
