"""Collectives staged through gloo, as ranks that share a GPU need them: here every tensor is on the CPU already."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.gpu import staged
from tests.helpers.comparing import assert_same
from tests.helpers.runs import Case, Layout, make_recipe, run, write_data
from tests.helpers.world import run_world


def _calls(group: dist.ProcessGroup) -> list[torch.Tensor]:
    """What each call leaves on this rank of two."""
    rank, found = dist.get_rank(), []
    mine = torch.arange(4.0).bfloat16() + 10 * rank
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
        found.append(mine.clone())
        dist.all_reduce(found[-1], op=op, group=group)
    found.append(mine.clone())
    dist.broadcast(found[-1], 1, group=group)
    parts = [torch.empty(4).bfloat16() for _ in range(2)]
    dist.all_gather(parts, mine, group=group)
    found += [*parts, torch.empty(8).bfloat16(), torch.empty(2).bfloat16()]
    dist.all_gather_into_tensor(found[-2], mine, group=group)
    dist.reduce_scatter_tensor(found[-1], mine, group=group)
    found.append(torch.empty(4).bfloat16())
    sizes = [[1, 3], [3, 1]]
    dist.all_to_all_single(found[-1], mine, sizes[rank], [1, 3] if rank == 0 else [3, 1], group=group)
    found.append(torch.empty(4).bfloat16())
    pair = [dist.P2POp(dist.isend, mine, 1 - rank, group), dist.P2POp(dist.irecv, found[-1], 1 - rank, group)]
    for work in dist.batch_isend_irecv(pair):
        work.wait()
    found.append(torch.empty(8, 2)[:, 0].bfloat16())
    handle = dist.all_gather_into_tensor(found[-1], mine, group=group, async_op=True)
    handle.wait()
    dist.barrier(group=group)
    objects: list[object] = [None, None]
    dist.all_gather_object(objects, {"rank": rank}, group=group)
    assert objects == [{"rank": 0}, {"rank": 1}]
    return found


def _both() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    staged.register()
    return _calls(dist.new_group(backend=staged.NAME)), _calls(dist.new_group(backend="gloo"))


def test_each_call_leaves_what_gloo_leaves():
    for through, plain in run_world(2, _both):
        for x, y in zip(through, plain, strict=True):
            assert torch.equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(Case(), Layout(tensor=2, sequence=True), id="tp2-sp"),
        pytest.param(Case(), Layout(pipeline=2, context=2), id="pp2-cp2"),
        pytest.param(Case(model="qwen3_moe"), Layout(data=2, expert=2), id="ep2"),
    ],
)
def test_a_run_through_it_is_the_run_on_gloo(case: Case, layout: Layout, tmp_path: Path):
    write_data(tmp_path)
    found, expected = (
        run(make_recipe(tmp_path / name, tmp_path, case, layout, 1), layout.world, before)
        for name, before in (("staged", _start_over), ("gloo", lambda: None))
    )
    assert_same(found, expected)


def _start_over() -> None:
    store = dist.distributed_c10d._get_default_store()
    rank, world = dist.get_rank(), dist.get_world_size()
    staged.take_over()
    dist.init_process_group("nccl", store=dist.PrefixStore("again", store), rank=rank, world_size=world)
