"""The first step and validation in plain float64: transformers' model, one sample at a time, the formula in Python
loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bft_megatron import rows
from bft_megatron.data.dataset import training_rows, validation_rows
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.hf.load import _Random
from bft_megatron.recipe import Recipe
from tests.layouts.runs import Result
from tests.objective import reference

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
    model = adapt(_model(made))
    folder = find_model(made.model)
    run_rows = rows.prepare_rows(made, folder, read_config(folder).vocab_size)
    batch = made.train.global_batch_size
    training = training_rows(run_rows.train, seed=made.train.seed, limit=run_rows.rows(made))
    validation = validation_rows(run_rows.valid, batch=1)
    valid, _ = _report(made, model, [validation[i] for i in range(run_rows.valid.rows)], windows_cp)
    train, loss = _report(made, model, [training[i] for i in range(batch)], windows_cp)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients.values()))
    return Result(
        [{"iteration": 1, **train, "grad_norm": norm}], [{"iteration": 0, "split": "valid", **valid}], gradients
    )


def _model(made: Recipe) -> torch.nn.Module:
    folder = find_model(made.model)
    config = read_config(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager").double()
    draw = _Random(config, made.train.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, None, 0, 0))
    return model


def _samples(row: dict[str, Tensor]) -> Iterator[Sample]:
    edges = row["cu_seqlens"].tolist() if "cu_seqlens" in row else [0, len(row["tokens"])]
    for k in range(int(row["samples"])):
        place = slice(edges[k], edges[k + 1])
        yield Sample(row["tokens"][place], row["labels"][place], float(row["weight"][k]))


def _report(
    made: Recipe, model: torch.nn.Module, batch: list[dict[str, Tensor]], cp: int
) -> tuple[dict[str, Any], Tensor]:
    """The reported quantities over a list of rows, and the objective with its graph."""
    settings = made.objective
    total, nll, p, correct, tokens = torch.zeros((), dtype=torch.float64), 0.0, 0.0, 0, 0
    confidences, sample_weights = [], []
    name = "group_normalised" if ":" in settings.name else settings.name
    reduce = settings.reduce or ("tokens" if name in ("sft", "dft") else "samples")
    for sample in (s for row in batch for s in _samples(row)):
        logits = model(sample.tokens[None]).logits[0]
        logp = reference.logprobs(logits, sample.labels)
        supervised = sample.labels != NONE
        chunks = [[t for t in c if supervised[t]] for c in reference.split(range(len(sample.labels)), cp)]
        token_weight, s = _weights(name, made, [[float(logp[t]) for t in c] for c in chunks])
        scale = sample.weight * s / (max(len(token_weight), 1) if reduce == "samples" else 1)
        for t, w in zip((t for c in chunks for t in c), token_weight, strict=True):
            total = total - scale * w * logp[t]
        nll -= float(logp.sum())
        p += float(logp[supervised].exp().sum())
        correct += int((logits.argmax(-1) == sample.labels).sum())
        tokens += int(supervised.sum())
        pieces = [[float(logp[t]) for t in c] for c in chunks]
        confidences.append(reference.confidence(pieces, settings.group_size, settings.confidence))
        sample_weights.append(s)
    divisor = len(confidences) if reduce == "samples" else tokens
    report = {
        "loss": float(total) / divisor,
        "lm_loss": nll / tokens,
        "mean_p": p / tokens,
        "accuracy": correct / tokens,
        "mean_confidence": sum(confidences) / len(confidences),
        "min_confidence": min(confidences),
        "mean_weight": sum(sample_weights) / len(sample_weights),
        "samples": len(confidences),
        "tokens": tokens,
    }
    return report, total / divisor


def _weights(name: str, made: Recipe, pieces: list[list[float]]) -> tuple[list[float], float]:
    """w_t of a sample's supervised tokens and s_b, from their log p in pieces that no window leaves."""
    settings, logp = made.objective, [x for piece in pieces for x in piece]
    if name == "sft":
        return [1.0] * len(logp), 1.0
    p = [math.exp(x) for x in logp]
    if name == "dft":
        return p, 1.0
    if name == "bft":
        return p, 1 - reference.confidence(pieces, settings.group_size, settings.confidence) ** settings.gamma
    around = [w for piece in pieces for w in reference.windows([math.exp(x) for x in piece], settings.group_size)]
    around = [sum(p) / len(p) if math.isinf(w) else w for w in around]
    return [min(1.0, x / c) for x, c in zip(p, around, strict=True)], 1 - min(around, default=0.0)
