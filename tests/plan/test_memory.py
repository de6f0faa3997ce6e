"""The ledger: what lives, under which name, and what is asked of values that are not there."""

from __future__ import annotations

from typing import Any

import torch

from bft_megatron.plan.estimate import wire_bytes
from bft_megatron.plan.memory import Collective, Ledger
from bft_megatron.plan.processes import each
from bft_megatron.upstream import without_values


def in_a_ledger(body: Any) -> Any:
    """`body(ledger)` in a process of its own, with a fake group of four."""
    [result] = each(_entered, [(body,)])
    return result


def _entered(body: Any) -> Any:
    without_values.join(1, 4)
    with Ledger("meta", lambda _: ("tp", 4)) as ledger:
        return body(ledger)


def test_storages_count_once_and_go_when_their_last_view_does():
    def body(ledger: Ledger) -> list[int]:
        x = torch.empty(1024, dtype=torch.bfloat16, device="meta")
        view, seen = x.view(2, 512), [ledger.now]
        del x
        seen.append(ledger.now)
        del view
        return [*seen, ledger.now]

    assert in_a_ledger(body) == [2048, 2048, 0]


def test_a_peak_knows_its_parts_and_when():
    def body(ledger: Ledger) -> Any:
        ledger.mark("forward")
        with ledger.within("activations"):
            kept = torch.empty(1000, device="meta")
        with ledger.within("head"):
            torch.empty(500, device="meta")
        del kept
        return ledger.step.peak, dict(ledger.step.at_peak), ledger.step.peak_mark

    assert in_a_ledger(body) == (4096 + 2048, {"activations": 4096, "head": 2048}, "forward")


def test_real_indices_stay_real_and_values_that_are_not_there_are_zero():
    def body(ledger: Ledger) -> Any:
        edges = torch.tensor([0, 3, 5])
        x = torch.empty(5, device="meta")
        return edges.diff().tolist(), x[edges.diff()].shape[0], x.sum().item(), x.tolist(), ledger.now

    lengths, picked, total, values, _ = in_a_ledger(body)
    assert (lengths, picked, total, values) == ([3, 2], 2, 0.0, [0.0] * 5)


def test_collectives_are_counted_by_message_and_make_buffers_communication():
    def body(ledger: Ledger) -> Any:
        with ledger.within("activations", "forward"):
            own = torch.empty(256, device="meta")
            whole = torch.empty(1024, device="meta")
            torch.distributed.all_gather_into_tensor(whole, own)
            torch.distributed.all_reduce(own)
        return dict(ledger.step.collectives), ledger.total["communication"]

    counted, communication = in_a_ledger(body)
    gather = Collective("_allgather_base_", "tp", 4, 4096, False)
    reduce = Collective("allreduce_", "tp", 4, 1024, False)
    assert counted == {("forward", gather): 1, ("forward", reduce): 1}
    assert communication == 4096
    assert wire_bytes(gather) == 3072
    assert wire_bytes(reduce) == 1536


def test_products_are_counted():
    def body(ledger: Ledger) -> Any:
        a, b = torch.empty(4, 8, device="meta"), torch.empty(8, 16, device="meta")
        a @ b
        return [work.flops for _, work in ledger.step.work if work.flops]

    assert in_a_ledger(body) == [2 * 4 * 8 * 16]
