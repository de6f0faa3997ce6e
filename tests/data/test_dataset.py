"""Rows as tensors: each supervised token once, no label across an edge, and the order of a run."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch.utils.data import DataLoader

from bft_megatron.conversations import chat, chat_tokenizer
from bft_megatron.data.blend import Blend, Part
from bft_megatron.data.dataset import RowDataset, training_rows, validation_rows
from bft_megatron.data.order import Shuffled
from bft_megatron.data.prepare import Prepared, prepare
from bft_megatron.reading import sources
from bft_megatron.recipe.schema import DataSettings
from tests.helpers.material import TINY

SETTINGS = DataSettings(train=str(TINY / "train.jsonl"), seq_length=256)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    """The tiny conversations, each with a weight of its own."""
    path = tmp_path_factory.mktemp("source") / "weighted.jsonl"
    lines = Path(SETTINGS.train).read_text().splitlines()
    path.write_text("".join(f'{line[:-1]}, "weight": {i + 1}}}\n' for i, line in enumerate(lines)))
    return replace(SETTINGS, train=str(path))


@pytest.fixture(scope="module", params=[1, 4, 16])
def packed(
    request: pytest.FixtureRequest, weighted: DataSettings, tmp_path_factory: pytest.TempPathFactory
) -> Prepared:
    return prepare(weighted.train, TINY, weighted, request.param, tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def padded(weighted: DataSettings, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    settings = replace(weighted, packing=False)
    return prepare(settings.train, TINY, settings, 1, tmp_path_factory.mktemp("padded"))


def expected(settings: DataSettings, tokenizer: chat_tokenizer.ChatTokenizer) -> Counter:
    """Samples as inputs, labels and weight, made from the source itself."""
    made = []
    for conversation in sources.read(settings.train):
        tokens, supervised = chat.encode(conversation.messages, tokenizer, "assistant")
        labels = [token if on else -100 for token, on in zip(tokens[1:], supervised[1:], strict=True)]
        made.append((tuple(tokens[:-1]), tuple(labels), conversation.weight))
    return Counter(made)


def test_packed_rows_hold_each_sample_once(
    packed: Prepared, weighted: DataSettings, tiny: chat_tokenizer.ChatTokenizer
) -> None:
    """Whatever the packing, an epoch's segments are the source's samples, padded, with their labels inside them."""
    found, want = Counter(), expected(weighted, tiny)
    by_weight = {weight: (tokens, labels) for tokens, labels, weight in want}
    for row in (validation_rows(packed, batch=1)[i] for i in range(packed.rows)):
        edges, real = row["cu_seqlens"].tolist(), 0
        assert (edges[0], edges[-1]) == (0, 256)
        assert all(edge % packed.pad_multiple == 0 for edge in edges)
        assert int(row["max_seqlen"]) == max(b - a for a, b in pairwise(edges))
        for k, (start, end) in enumerate(pairwise(edges)):
            assert row["position_ids"][start:end].tolist() == list(range(end - start))
            weight = float(row["weight"][k])
            tokens, labels = by_weight[weight] if k < row["samples"] else ((), ())
            padding = end - start - len(tokens)
            assert padding < packed.pad_multiple or k == row["samples"]
            assert row["tokens"][start:end].tolist() == [*tokens, *[0] * padding]
            assert row["labels"][start:end].tolist() == [*labels, *[-100] * padding]
            found.update([(tokens, labels, weight)] if tokens else [])
            real += len(tokens)
        assert len(row["weight"]) - row["samples"] in (0, 1), "one segment at most is none"
        assert row["real_tokens"] == real
    assert found == want


def test_padded_rows_hold_one_sample_each(
    padded: Prepared, weighted: DataSettings, tiny: chat_tokenizer.ChatTokenizer
) -> None:
    found: Counter = Counter()
    for row in (validation_rows(padded, batch=1)[i] for i in range(padded.rows)):
        n = int(row["real_tokens"])
        assert row["position_ids"].tolist() == list(range(256))
        assert row["samples"] == 1
        assert not row["tokens"][n:].any()
        assert (row["labels"][n:] == -100).all()
        assert "cu_seqlens" not in row
        (weight,) = row["weight"].tolist()
        found.update([(tuple(row["tokens"][:n].tolist()), tuple(row["labels"][:n].tolist()), weight)])
    assert found == expected(weighted, tiny)


def test_rows_are_counted_without_being_read(packed: Prepared, padded: Prepared) -> None:
    for prepared in (packed, padded):
        rows = training_rows(Blend((Part("one", prepared), Part("two", prepared))), seed=0, limit=9)
        numbered = [row for row in (rows[i] for i in range(12)) if row["row"] >= 0]
        found = rows.counts([int(row["row"]) for row in numbered])
        assert found.samples == sum(int(row["samples"]) for row in numbered)
        assert found.supervised == sum(int((row["labels"] != -100).sum()) for row in numbered)
        assert found.tokens == sum(int((~row["padding"]).sum()) for row in numbered)
        assert found.tokens == sum(int(row["real_tokens"]) for row in numbered)


def test_types_and_shapes(packed: Prepared, padded: Prepared) -> None:
    kinds = {"weight": torch.float32, "cu_seqlens": torch.int32, "padding": torch.bool}
    whole = {"tokens", "labels", "position_ids", "padding"}
    for prepared in (packed, padded):
        for row in (training_rows(prepared, seed=0, limit=1)[i] for i in range(2)):  # a row, and one past the end
            assert all(value.dtype == kinds.get(name, torch.int64) for name, value in row.items())
            assert all(value.shape == (256,) for name, value in row.items() if name in whole)
            assert all(row[name].shape == () for name in {"samples", "real_tokens", "row", "max_seqlen"} & row.keys())


def numbers(rows: RowDataset, places: range) -> list[int]:
    return [int(rows[place]["row"]) for place in places]


def test_each_epoch_is_a_permutation_of_its_own(packed: Prepared) -> None:
    n = packed.rows
    rows = training_rows(packed, seed=1, limit=3 * n)
    epochs = [numbers(rows, range(e * n, (e + 1) * n)) for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_place_holds_the_same_row_in_any_process_at_any_time(packed: Prepared) -> None:
    """What resuming in the middle of an epoch, at its edge or after it rests on; and another seed is another order."""
    places = range(3 * packed.rows)
    whole = numbers(training_rows(packed, seed=1, limit=len(places)), places)
    backwards = numbers(training_rows(packed, seed=1, limit=len(places)), places[::-1])
    assert backwards[::-1] == whole
    assert numbers(training_rows(packed, seed=2, limit=len(places)), places) != whole


def test_the_order_never_changes() -> None:
    """A run that is resumed with another release must find the order that it began with."""
    order = Shuffled(rows=(10,), taken=(10,), seed=1234, limit=20)
    first, second = [5, 6, 3, 9, 7, 4, 1, 2, 8, 0], [9, 2, 0, 7, 6, 1, 8, 4, 5, 3]
    assert [order.row(place) for place in range(22)] == [*first, *second, None, None]


def epochs(order: Shuffled, n: int) -> list[list[int]]:
    size = sum(order.taken)
    return [[order.row(place) for place in range(e * size, (e + 1) * size)] for e in range(n)]


def test_a_blend_takes_each_source_as_often_as_its_weight_says() -> None:
    """Ten rows twice, ten once, ten at a third: what one epoch leaves of these comes in the next ones."""
    made = epochs(Shuffled(rows=(10, 10, 10), taken=(20, 10, 3), seed=1, limit=10**6), 10)
    for epoch in made:
        counts = Counter(epoch)
        assert all(counts[row] == 2 for row in range(10))
        assert all(counts[row] == 1 for row in range(10, 20))
        assert sum(counts[row] for row in range(20, 30)) == 3
    third = [row for epoch in made for row in sorted(r for r in epoch if r >= 20)]
    assert Counter(third) == dict.fromkeys(range(20, 30), 3)
    assert all(len(set(third[:n])) == n for n in (3, 6, 9)), "no row again before all have come once"
    assert sorted(made[0]) != sorted(made[1])


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_going_on_anywhere_with_any_ranks_takes_no_row_twice_and_leaves_none_out(ranks: int) -> None:
    """Steps of six rows over epochs of 33, gone on with after any step, through Megatron's own sampler."""
    batch, limit = 6, 150
    made = Shuffled(rows=(10, 10, 10), taken=(20, 10, 3), seed=1, limit=limit)
    whole = [made.row(place) for place in range(limit)]
    for done in range(limit // batch):  # steps 5, 11, 16 and 22 have an epoch's edge in them or behind them
        anew = Shuffled(rows=(10, 10, 10), taken=(20, 10, 3), seed=1, limit=limit)
        left: list[int | None] = []
        samplers = [iter(MegatronPretrainingSampler(1 << 40, done * batch, 1, rank, ranks)) for rank in range(ranks)]
        for _ in range(limit // ranks - done * batch // ranks):
            left += [anew.row(place) for sampler in samplers for place in next(sampler)]
        assert left == whole[done * batch :]
        assert [anew.row(place) for sampler in samplers for place in next(sampler)] == [None] * ranks


def test_a_row_says_which_source_it_is_from(packed: Prepared, padded: Prepared) -> None:
    twice = Blend((Part("one", packed), Part("other", packed, weight=0.5)))
    assert twice.rows == packed.rows + round(packed.rows / 2)
    rows = validation_rows(twice, batch=1)
    for place in range(2 * packed.rows):
        mine, own = rows[place], validation_rows(packed, batch=1)[place % packed.rows]
        assert (mine["source"], mine["row"]) == (place // packed.rows, place)
        assert all(torch.equal(value, mine[name]) for name, value in own.items() if name not in ("source", "row"))
    assert twice.counts.tokens == 2 * packed.counts.tokens


def test_past_the_end_are_rows_without_samples(packed: Prepared, padded: Prepared) -> None:
    for prepared in (packed, padded):
        rows = training_rows(prepared, seed=1, limit=5)
        assert all(rows[place]["samples"] > 0 for place in range(5))
        for place in (5, 6, 10**9):
            row = rows[place]
            assert (row["samples"], row["real_tokens"], row["row"]) == (0, 0, -1)
            assert row["weight"].tolist() == [0]
            assert (row["labels"] == -100).all()
    assert rows[5].keys() == rows[4].keys()
    assert training_rows(packed, seed=1, limit=5)[5]["cu_seqlens"].tolist() == [0, 256]


def test_validation_repeats_whole_passes(packed: Prepared) -> None:
    n = packed.rows
    rows = validation_rows(packed, batch=n + 3)
    want = [*range(n), -1, -1, -1]
    assert numbers(rows, range(2 * (n + 3))) == want * 2
    assert numbers(validation_rows(packed, batch=1), range(n + 1)) == [*range(n), 0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")  # as Megatron's loaders fork theirs
def test_longer_than_any_run_and_read_by_workers(padded: Prepared) -> None:
    rows = training_rows(padded, seed=1, limit=4)
    assert len(rows) > 10**12
    again = pickle.loads(pickle.dumps(rows))
    for place, batch in enumerate(DataLoader(again, batch_sampler=[[0, 1], [2, 3]], num_workers=1, timeout=60)):
        for name, value in batch.items():
            assert torch.equal(value, torch.stack([rows[2 * place][name], rows[2 * place + 1][name]]))
