"""The comparison with the reference can fail: it sees each thing that the objective may get wrong, broken by hand.

One packed row goes through the step on TP 2 x CP 2, behind an embedding and Megatron's own output layer. Loss, reports
and gradients must be those of float64; broken, the number that a mutation hurts must be far from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.objective import loss, view
from bft_megatron.objective.view import Geometry, View
from bft_megatron.recipe.schema import ObjectiveSettings
from bft_megatron.reporting.totals import Meter
from bft_megatron.training import head, measuring, step
from tests.helpers import objective_reference as reference
from tests.helpers.comparing import TOLERANCE, differences
from tests.helpers.objective_reference import NONE, Setting
from tests.helpers.runs import Result
from tests.helpers.world import run_world

TP = CP = 2
VOCABULARY, PADDED = 26, 32
LENGTHS = [40, 16, 24, 64, 8, 32]
"""Of the samples in the row; the third has no label, the last is the tail, which is no sample."""
EDGES = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
GROUP_SIZE = 5
Patch = pytest.MonkeyPatch


def _batch() -> dict[str, Tensor]:
    """The row as a data set gives it; in half of the places the label is the one that the weights make likely."""
    generator = torch.Generator().manual_seed(11)
    labels = reference.random_rows(generator, LENGTHS, VOCABULARY)
    labels[EDGES[-2] :] = NONE
    tokens = torch.randint(VOCABULARY, (EDGES[-1],), generator=generator)
    follows = torch.rand(EDGES[-1], generator=generator) < 0.5
    tokens = torch.where((labels != NONE) & follows, labels, tokens)
    return {
        "tokens": tokens[None],
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "samples": torch.tensor([len(LENGTHS) - 1]),
        "weight": torch.tensor([[1.0, 0.5, 1.0, 2.0, 1.5, 0.0]]),
        "padding": torch.arange(EDGES[-1])[None] >= EDGES[-2],
        "real_tokens": torch.tensor([EDGES[-2]]),
        "row": torch.tensor([0]),
        "source": torch.tensor([0]),
        "cu_seqlens": torch.tensor([EDGES], dtype=torch.int32),
        "max_seqlen": torch.tensor([max(LENGTHS)]),
    }


def _weights() -> tuple[Tensor, Tensor]:
    """embedding [v, h], output layer [padded v, h]: the likeliest successor of a token is the token itself."""
    generator = torch.Generator().manual_seed(12)
    output = torch.randn(PADDED, PADDED, generator=generator) * 0.3 + torch.eye(PADDED)
    likely = 6 * torch.rand(VOCABULARY, 1, generator=generator) * torch.eye(VOCABULARY, PADDED)
    return torch.randn(VOCABULARY, PADDED, generator=generator) * 0.5 + likely, output


def _expected() -> Result:
    """The step in float64: every token by itself, windows over whole samples."""
    embedding, output = (w.double().requires_grad_() for w in _weights())
    batch = {name: x[0] for name, x in _batch().items()}
    labels, weight = batch["labels"], batch["weight"]
    logits = embedding[batch["tokens"]] @ output.t()
    logp = reference.logprobs(logits, labels, VOCABULARY)
    total = reference.loss(Setting("bft", "samples", GROUP_SIZE), logp, labels, EDGES, weight)
    samples, supervised = len(LENGTHS) - 1, labels != NONE
    gradients = torch.autograd.grad(total / samples, (embedding, output))
    pieces = [logp[a:b][supervised[a:b]].tolist() for a, b in pairwise(EDGES[:-1])]
    c = [reference.confidence([piece], GROUP_SIZE, "geometric") for piece in pieces]
    report = {
        "iteration": 1,
        "loss": total.item() / samples,
        "lm_loss": -math.fsum(logp.tolist()) / int(supervised.sum()),
        "mean_p": math.fsum(math.exp(x) for piece in pieces for x in piece) / int(supervised.sum()),
        "accuracy": float((logits[supervised, :VOCABULARY].argmax(-1) == labels[supervised]).double().mean()),
        "mean_confidence": math.fsum(c) / samples,
        "min_confidence": min(c),
        "without_window": sum(reference.without_window([piece], GROUP_SIZE) for piece in pieces) / samples,
        "mean_weight": math.fsum(1 - x for x in c) / samples,
        "samples": samples,
        "tokens": int(supervised.sum()),
    }
    return Result([report], [], {"embedding": gradients[0], "output": gradients[1]})


def _one_step(embedding: Tensor, layer: Any) -> Result:
    """On a rank, whose output layer holds its columns: the step's numbers over all ranks, divided as Megatron does."""
    from megatron.core import parallel_state

    context, tensor = parallel_state.get_context_parallel_group(), parallel_state.get_tensor_model_parallel_group()
    meter, settings = Meter(), ObjectiveSettings(group_size=GROUP_SIZE, cp_windows="exact")
    training = step.Step(settings, VOCABULARY, measuring.into(meter))

    def model(tokens: Tensor, *_: Any, output_processor: head.Head, **__: Any) -> Tensor:
        hidden = embedding[tokens].transpose(0, 1)
        return output_processor(hidden_states=hidden, output_layer=layer, output_weight=None)

    model.training = True
    logp, function = training.forward(iter([_batch()]), model)
    total, count, _ = function(logp)
    columns = layer.weight
    gradients = list(torch.autograd.grad(total, (embedding, columns)))
    for x in (count, *gradients):
        dist.all_reduce(x, group=context)
    shards = [torch.empty_like(columns) for _ in range(TP)]
    dist.all_gather(shards, gradients[1], group=tensor)
    found = {"embedding": gradients[0] / count, "output": torch.cat(shards).detach() / count}
    meter.reduce(parallel_state.get_data_parallel_group(with_context_parallel=True))
    return Result([{"iteration": 1, **meter.totals.report()}], [], found)


def cross_sample_edges(patch: Patch) -> None:
    """Windows run over the whole row."""
    within = view._trailing_means
    patch.setattr(view, "_trailing_means", lambda x, span, g: within(x, torch.zeros_like(span), g))


def take_the_surest_window(patch: Patch) -> None:
    """The highest mean in place of the lowest."""
    lowest = View.min
    patch.setattr(View, "min", lambda self, x: -lowest(self, torch.where(x.isinf(), x, -x)))


def keep_the_minimum_local(patch: Patch) -> None:
    """No MIN all-reduce over context parallelism."""
    lowest = View.min
    patch.setattr(View, "min", lambda self, x: lowest(replace(self, _group=None), x))


def keep_sums_local(patch: Patch) -> None:
    """No SUM all-reduce over context parallelism, for samples too short for a window."""
    total = View.sum
    patch.setattr(View, "sum", lambda self, x: total(replace(self, _group=None), x))


def count_tokens_by_rank(patch: Patch) -> None:
    """n_b of a context-parallel rank's own tokens."""
    patch.setattr(
        Geometry, "n", property(lambda self: torch.bincount(self._sample_at[self._tokens], minlength=len(LENGTHS)))
    )


def count_samples_on_every_rank(patch: Patch) -> None:
    """The divisor counts each sample once a context-parallel rank."""
    patch.setattr(loss, "_count", lambda objective, geometry, seen: int(geometry.counted.sum()))


def count_the_tail(patch: Patch) -> None:
    """The padding behind a packed row's samples counts as one."""
    patch.setattr(step.Batch, "counted", property(lambda self: torch.ones(len(self.edges) - 1, dtype=torch.bool)))


def let_gradients_into_weights(patch: Patch) -> None:
    """w_t = p_t is not detached."""
    whole = step.objective_sum

    def attached(objective: Any, geometry: Geometry, seen: View, logp: Tensor) -> Any:
        weights = lambda v: (geometry.take(logp).double().exp(), objective.weights(v)[1])  # noqa: E731
        return whole(replace(objective, weights=weights), geometry, seen, logp)

    patch.setattr(step, "objective_sum", attached)


def weigh_samples_twice(patch: Patch) -> None:
    """The data's weight is squared."""
    made = Geometry.view

    def twice(self: Geometry, *args: Any) -> View:
        seen = made(self, *args)
        return replace(seen, weight=seen.weight**2)

    patch.setattr(Geometry, "view", twice)


def _with_labels(patch: Patch, change: Callable[[Tensor], Tensor]) -> None:
    batch = step.Batch
    patch.setattr(step, "Batch", lambda **fields: batch(**fields | {"labels": change(fields["labels"])}))


def mask_token_0(patch: Patch) -> None:
    """The mask is `label > 0` in place of `label >= 0`."""
    _with_labels(patch, lambda labels: torch.where(labels > 0, labels, NONE))


def leave_labels_unshifted(patch: Patch) -> None:
    """A position's label is its own token."""
    _with_labels(patch, lambda labels: labels.roll(1))


def keep_the_labels_logit_local(patch: Patch) -> None:
    """The logit of the label, which one tensor-parallel rank holds, does not reach the others."""
    from bft_megatron.objective import logprobs

    whole = logprobs.merge_ranks
    patch.setattr(
        logprobs, "merge_ranks", lambda shard, group: replace(whole(shard, group), label_logit=shard.label_logit)
    )


def let_padded_columns_in(patch: Patch) -> None:
    """Megatron's vocabulary padding takes part in the softmax."""
    statistics = head.vocab_parallel_statistics
    patch.setattr(
        head, "vocab_parallel_statistics", lambda *args, **options: statistics(*args, **options | {"vocab_size": None})
    )


MUTATIONS: dict[Callable[[Patch], None], str] = {
    cross_sample_edges: "train 1 mean_confidence",
    take_the_surest_window: "train 1 mean_confidence",
    keep_the_minimum_local: "train 1 mean_confidence",
    keep_sums_local: "train 1 mean_confidence",
    count_tokens_by_rank: "train 1 loss",
    count_samples_on_every_rank: "gradient output",
    count_the_tail: "train 1 samples",
    let_gradients_into_weights: "gradient output",
    weigh_samples_twice: "train 1 loss",
    mask_token_0: "train 1 tokens",
    leave_labels_unshifted: "train 1 lm_loss",
    keep_the_labels_logit_local: "train 1 lm_loss",
    let_padded_columns_in: "train 1 lm_loss",
}
"""What is broken, and one of the numbers that it changes."""


def _all() -> list[Result]:
    """On a rank: the step as it is, then with each mutation."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel(TP, context_parallel_size=CP)
    model_parallel_cuda_manual_seed(1)
    embedding, output = _weights()
    embedding.requires_grad_()
    config = TransformerConfig(num_layers=1, hidden_size=PADDED, num_attention_heads=TP, tensor_model_parallel_size=TP)
    layer = ColumnParallelLinear(PADDED, PADDED, config=config, init_method=torch.nn.init.normal_, bias=False)
    layer.weight.data = output.chunk(TP)[parallel_state.get_tensor_model_parallel_rank()].clone()
    found = [_one_step(embedding, layer)]
    for mutate in MUTATIONS:
        with pytest.MonkeyPatch.context() as patch:
            mutate(patch)
            found.append(_one_step(embedding, layer))
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    """mutation, or "nothing" -> differences from the reference by name."""
    results, *_ = run_world(TP * CP, _all, megatron=True)
    expected = _expected()
    names = ["nothing", *(mutate.__name__ for mutate in MUTATIONS)]
    return {name: differences(result, expected) for name, result in zip(names, results, strict=True)}


def test_unbroken_it_agrees(found: dict[str, dict[str, float]]):
    assert max(found["nothing"].values()) <= TOLERANCE, found["nothing"]


@pytest.mark.parametrize(("mutate", "hurt"), MUTATIONS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_mutation_is_seen(mutate: Callable[[Patch], None], hurt: str, found: dict[str, dict[str, float]]):
    assert found[mutate.__name__][hurt] > 20 * TOLERANCE
