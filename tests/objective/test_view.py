"""Rows and View against plain loops: padded and packed, one process and real context-parallel ones, both windows."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bft_megatron.objective.view import Geometry, View, zigzag
from tests.helpers import objective_reference as reference
from tests.helpers.world import run_world

LAYOUTS = {  # lengths of samples, multiples of 8 to split over 4 ranks; the last of a packed row is its tail
    "padded": [48, 48, 48, 48],
    "packed": [16, 64, 24, 8, 80, 40],
    "one sample": [64],
    "nothing supervised": [16, 8],
    "packed to the brim": [32, 8, 8, 16, 0],
}


def _geometry(layout: str, group: Any = None, windows: Any = "per_rank") -> tuple[Geometry, Tensor]:
    """The layout's geometry with random labels, and a value for each of the N positions."""
    lengths = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(sum(lengths))
    labels = reference.random_rows(generator, lengths, 100)
    if layout.startswith("packed") and lengths[-1]:
        labels[-lengths[-1] :] = reference.NONE
    if layout == "nothing supervised":
        labels[:] = reference.NONE
    if layout == "one sample":  # nothing but the first chunk of four ranks: three of them have no supervised token
        labels[8:] = reference.NONE
    counted = torch.tensor([True] * (len(lengths) - 1) + [layout in ("padded", "one sample")])
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    values = torch.randn(sum(lengths), generator=generator).abs().neg()
    return Geometry(labels, edges, counted, torch.rand(len(lengths), generator=generator), group, windows), values


def _samples(geometry: Geometry, cp: int = 1) -> list[list[list[int]]]:
    """Each sample's supervised positions, by chunk."""
    edges = geometry.cu_seqlens.tolist()
    return [
        [[t for t in chunk if geometry.labels[t] != reference.NONE] for chunk in reference.split(range(a, b), cp)]
        for a, b in pairwise(edges)
    ]


def _check_view(
    view: View, geometry: Geometry, values: Tensor, cp: int, exact: bool, positions: list[int], g: int
) -> None:
    """A rank's view of `values` [N] against loops over the whole rows."""
    tokens = [t for t in positions if geometry.labels[t] != reference.NONE]
    samples = _samples(geometry, cp)
    sample_of = {t: b for b, chunks in enumerate(samples) for chunk in chunks for t in chunk}
    x = [[float(values[t]) for chunk in chunks for t in chunk] for chunks in samples]
    assert view.logp.tolist() == [float(values[t]) for t in tokens]
    assert view.sample.tolist() == [sample_of[t] for t in tokens]
    assert view.n.tolist() == [len(s) for s in x]
    assert torch.equal(view.weight, geometry.weight)
    _close(view.sum(view.logp), [math.fsum(s) for s in x])
    _close(view.mean(view.logp), [math.fsum(s) / max(len(s), 1) for s in x])
    _close(view.min(view.logp), [min([math.inf, *s]) for s in x])
    trailing = {}
    for chunks in samples:
        for piece in [[t for chunk in chunks for t in chunk]] if exact else chunks:
            trailing.update(zip(piece, reference.windows([float(values[t]) for t in piece], g), strict=True))
    _close(view.windows(view.logp, g), [trailing[t] for t in tokens])
    _close(
        view.min(view.windows(view.logp, g)), [min([math.inf, *(trailing[t] for c in s for t in c)]) for s in samples]
    )


def _close(found: Tensor, expected: list[float]) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_zigzag(cp: int):
    edges = [0, 24, 24, 72, 96, 216]
    ranks = [zigzag(torch.tensor(edges, dtype=torch.int32), cp, rank).tolist() for rank in range(cp)]
    assert ranks == [reference.held(edges, cp, rank) for rank in range(cp)]
    assert sorted(t for positions in ranks for t in positions) == list(range(216))


def test_zigzag_refuses_what_it_cannot_split():
    with pytest.raises(ValueError, match="multiple of 2 \\* cp = 4"):
        zigzag(torch.tensor([0, 8, 14]), 2, 0)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_one_process(data: st.DataObject):
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=6), "lengths")
    masked = data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)), "masked")
    labels = torch.where(torch.tensor(masked, dtype=torch.bool), reference.NONE, 7)
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    geometry = Geometry(labels, edges, torch.ones(len(lengths), dtype=torch.bool), torch.rand(len(lengths)))
    values = -torch.rand(sum(lengths)) * 9
    view = geometry.view(values)
    _check_view(view, geometry, values, 1, False, list(range(sum(lengths))), data.draw(st.integers(1, 6), "g"))


def _on_a_rank(windows: str) -> None:
    cp, rank = dist.get_world_size(), dist.get_rank()
    for layout in LAYOUTS:
        for g in (1, 3, 6):
            geometry, values = _geometry(layout, dist.group.WORLD, windows)
            positions = reference.held(geometry.cu_seqlens.tolist(), cp, rank)
            assert geometry.positions.tolist() == positions
            assert geometry.supervised.tolist() == [bool(geometry.labels[t] != reference.NONE) for t in positions]
            _check_view(geometry.view(values[positions]), geometry, values, cp, windows == "exact", positions, g)


@pytest.mark.parametrize("windows", ["per_rank", "exact"])
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_context_parallel(cp: int, windows: str):
    run_world(cp, _on_a_rank, windows)


def test_entropy_is_cut_as_log_p_is():
    geometry, values = _geometry("packed")
    view = geometry.view(values, entropy=values * 2)
    assert torch.equal(view.entropy, view.logp * 2)
    assert geometry.view(values).entropy is None


def test_a_view_is_detached_and_take_is_not():
    geometry, values = _geometry("packed")
    x = values.requires_grad_()
    assert not geometry.view(x).logp.requires_grad
    upstream = torch.randn(int(geometry.supervised.sum()))
    (gradient,) = torch.autograd.grad((geometry.take(x) * upstream).sum(), x)
    assert torch.equal(gradient[geometry.supervised], upstream)
    assert not gradient[~geometry.supervised].any()


def test_windows_do_not_depend_on_the_place_in_a_long_row():
    """fp32 prefix sums would be off by 1e-5 here."""
    sample = -torch.rand(300, generator=torch.Generator().manual_seed(1)) * 5
    noise = -torch.rand(131072, generator=torch.Generator().manual_seed(2)) * 20
    labels = torch.zeros(300 + 131072, dtype=torch.int64)
    both = torch.ones(2, dtype=torch.bool)
    first = Geometry(labels, torch.tensor([0, 300, len(labels)]), both, torch.ones(2)).view(torch.cat([sample, noise]))
    last = Geometry(labels, torch.tensor([0, 131072, len(labels)]), both, torch.ones(2)).view(
        torch.cat([noise, sample])
    )
    here, there = first.min(first.windows(first.logp, 256))[0], last.min(last.windows(last.logp, 256))[1]
    torch.testing.assert_close(here, there, rtol=1e-11, atol=0)
