"""The first step and validation in plain float64: transformers' model, one sample at a time, the formula in Python
loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from bft_megatron.data.blend import Blend
from bft_megatron.data.dataset import training_rows, validation_rows
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.hf.load import _Random
from bft_megatron.hf.weights import places
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.prepared import prepare_rows
from tests.helpers import in_float64
from tests.helpers import objective_reference as reference
from tests.helpers.runs import Result

NONE = -100


@dataclass
class Sample:
    """A sample as it lies in its row, padding included."""

    tokens: Tensor
    labels: Tensor
    weight: float


def first_step(
    made: Recipe, windows_cp: int = 1, adapt: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model
) -> Result:
    """What one process must report of step 1 and of the validation before it, and every gradient of step 1.

    Args:
        windows_cp: with per_rank windows, the context-parallel size whose chunks they stay in.
        adapt: what is done to the model first; gradients are of what it leaves trainable.
    """
    model = adapt(whole_model(made))
    folder = find_model(made.model)
    run_rows = prepare_rows(made, folder, read_config(folder).vocab_size)
    batch = made.train.global_batch_size
    training = training_rows(run_rows.train, seed=made.train.seed, limit=run_rows.total)
    validation = validation_rows(run_rows.valid, batch=1)
    valid = measure(made, model, [validation[i] for i in range(run_rows.valid.rows)], windows_cp)
    train = measure(made, model, [training[i] for i in range(batch)], windows_cp)
    report, loss = _report(made, train)
    loss.backward()
    gradients = _named_as_in_files(model, {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients.values()))
    sources = {
        name: {key: _report(made, own)[0][key] for key in ("loss", "mean_p", "samples", "tokens")}
        for name, own in _by_source(run_rows.train, train).items()
    }
    splits = {"valid": valid, **_by_source(run_rows.valid, valid)}
    return Result(
        [{"iteration": 1, **report, **({"sources": sources} if sources else {}), "grad_norm": norm}],
        [{"iteration": 0, "split": split, **_report(made, measured)[0]} for split, measured in splits.items()],
        gradients,
    )


def _by_source(blend: Blend, measured: list[Measured]) -> dict[str, list[Measured]]:
    """The samples of each source that has some, where there are several sources."""
    apart = {name: [m for m in measured if m.source == i] for i, name in enumerate(blend.names)}
    return {name: own for name, own in apart.items() if own and len(apart) > 1}


def whole_model(made: Recipe) -> torch.nn.Module:
    """transformers' model in fp64 with the weights that the recipe draws, its experts one after the other."""
    folder = find_model(made.model)
    config = read_config(folder)
    draw = _Random(config, made.train.seed)
    state = {t.name: draw(t, None, 0, 0) for t in places(config)}
    kind = getattr(transformers, config.architecture)
    if config.linear_attention is not None:
        kind = in_float64.model_class(config.architecture)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float64}
    of_files = AutoConfig.from_pretrained(folder)
    return kind.from_pretrained(None, config=of_files, state_dict=state, **plain)


def _named_as_in_files(model: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters' values by the names of the files, of which transformers joins an expert's and all experts'."""
    return values if not hasattr(model, "_weight_conversions") else revert_weight_conversion(model, values)


def _samples(row: dict[str, Tensor]) -> Iterator[Sample]:
    edges = row["cu_seqlens"].tolist() if "cu_seqlens" in row else [0, len(row["tokens"])]
    for k in range(int(row["samples"])):
        place = slice(edges[k], edges[k + 1])
        yield Sample(row["tokens"][place], row["labels"][place], float(row["weight"][k]))


@dataclass
class Measured:
    """A sample's share of the sums: its loss with its graph, the others as numbers."""

    source: int
    loss: Tensor
    nll: float
    p: float
    correct: int
    tokens: int
    confidence: float
    without_window: bool
    weight: float


def measure(made: Recipe, model: torch.nn.Module, batch: list[dict[str, Tensor]], cp: int = 1) -> list[Measured]:
    """The samples of a list of rows, one by one."""
    settings = made.objective
    name, reduce = _objective(made)
    found = []
    for source, sample in ((int(row["source"]), s) for row in batch for s in _samples(row)):
        logits = model(sample.tokens[None]).logits[0]
        logp = reference.logprobs(logits, sample.labels)
        supervised = sample.labels != NONE
        chunks = [[t for t in c if supervised[t]] for c in reference.split(range(len(sample.labels)), cp)]
        values = logp.tolist()
        pieces = [[values[t] for t in c] for c in chunks]
        token_weight, s = _weights(name, made, pieces)
        scale = sample.weight * s / (max(len(token_weight), 1) if reduce == "samples" else 1)
        loss = torch.zeros((), dtype=torch.float64)
        for t, w in zip((t for c in chunks for t in c), token_weight, strict=True):
            loss = loss - scale * w * logp[t]
        found.append(
            Measured(
                source=source,
                loss=loss,
                nll=-float(logp.sum()),
                p=float(logp[supervised].exp().sum()),
                correct=int((logits.argmax(-1) == sample.labels).sum()),
                tokens=int(supervised.sum()),
                confidence=reference.confidence(pieces, settings.group_size, settings.confidence),
                without_window=reference.without_window(pieces, settings.group_size),
                weight=s,
            )
        )
    return found


def _objective(made: Recipe) -> tuple[str, str]:
    """Its name and what its loss is averaged over."""
    name = "group_normalised" if ":" in made.objective.name else made.objective.name
    return name, made.objective.reduce or ("samples" if name in ("bft", "group_normalised") else "tokens")


def _report(made: Recipe, measured: list[Measured]) -> tuple[dict[str, Any], Tensor]:
    """The reported quantities over samples, and the objective with its graph."""
    tokens, samples = sum(m.tokens for m in measured), len(measured)
    loss = sum(m.loss for m in measured) / (samples if _objective(made)[1] == "samples" else tokens)
    report = {
        "loss": float(loss),
        "lm_loss": sum(m.nll for m in measured) / tokens,
        "mean_p": sum(m.p for m in measured) / tokens,
        "accuracy": sum(m.correct for m in measured) / tokens,
        "mean_confidence": sum(m.confidence for m in measured) / samples,
        "min_confidence": min(m.confidence for m in measured),
        "without_window": sum(m.without_window for m in measured) / samples,
        "mean_weight": sum(m.weight for m in measured) / samples,
        "samples": samples,
        "tokens": tokens,
    }
    return report, loss


def _weights(name: str, made: Recipe, pieces: list[list[float]]) -> tuple[list[float], float]:
    """w_t of a sample's supervised tokens and s_b, from their log p in pieces that no window leaves."""
    settings, logp = made.objective, [x for piece in pieces for x in piece]
    if name != "group_normalised":
        c = reference.confidence(pieces, settings.group_size, settings.confidence) if name == "bft" else 0.0
        return [reference.token_weight(name, settings.options, x) for x in logp], 1 - c**settings.gamma
    p = [math.exp(x) for x in logp]
    around = [w for piece in pieces for w in reference.windows([math.exp(x) for x in piece], settings.group_size)]
    around = [sum(p) / len(p) if math.isinf(w) else w for w in around]
    return [min(1.0, x / c) for x, c in zip(p, around, strict=True)], 1 - min(around, default=0.0)
