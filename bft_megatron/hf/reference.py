"""The reference of `bft-megatron check`: transformers' outputs for rows, one sample at a time on one process.

It has every layer's output, the logits, the plain loss, and the objective by the drop-in function for transformers'
`Trainer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bft_megatron.hf import hub
from bft_megatron.hf.load import open_source
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.routing import Routing, differing
from bft_megatron.hf.trainer import batch_sum
from bft_megatron.hf.weights import places
from bft_megatron.labels import IGNORE_INDEX
from bft_megatron.objective.records import Objective

Row = dict[str, Tensor]
"""A row as `data.dataset` returns it."""


def stages(layers: int) -> list[str]:
    """Return the names of the compared outputs, in the order in which they are computed."""
    return ["embedding", *(f"layer {i + 1}" for i in range(layers)), "final norm", "logits"]


@dataclass
class Reference:
    """A model's outputs and losses for some rows."""

    outputs: list[list[Tensor]] = field(repr=False)
    """By row and stage, fp32: [s, h], for the logits [s, v]; 0 at places without a sample."""
    chosen: list[list[Tensor]] = field(repr=False, default_factory=list)
    """By row and layer that has experts: those that the router chooses, [s, k]; -1 at places without a sample."""
    loss: float = 0.0
    """The objective's value."""
    lm_loss: float = 0.0
    tokens: int = 0

    def scale(self) -> Tensor:
        """Return the largest absolute element of each stage, [stages]."""
        return torch.stack([torch.stack([x.abs().max() for x in row]) for row in self.outputs]).amax(0)

    def error(self, other: Reference) -> Tensor:
        """Return the largest difference from `other` in each stage, relative to `scale`, [stages]."""
        rows = zip(self.outputs, other.outputs, strict=True)
        worst = [torch.stack([(x - y).abs().max() for x, y in zip(*pair, strict=True)]) for pair in rows]
        return torch.stack(worst).amax(0) / self.scale()

    def rerouted(self, other: Reference) -> Tensor:
        """Return the share of tokens for which the two models' routers choose other experts, [layers with experts]."""
        found = []
        for layer in zip(
            *(zip(*pair, strict=True) for pair in zip(self.chosen, other.chosen, strict=True)), strict=True
        ):
            own, others = (torch.cat(rows) for rows in zip(*layer, strict=True))
            found.append(differing(own, others)[own[:, 0] >= 0].float().mean())
        return torch.stack(found) if found else torch.zeros(0)


@torch.no_grad()
def compute(
    model: torch.nn.Module, rows: list[Row], objective: Objective, experts: int = 0, routed_as: Reference | None = None
) -> Reference:
    """Run a transformers model over each sample of the rows, and the objective over its logits.

    Args:
        experts: number of experts of a layer; 0: there are none.
        routed_as: what has the experts that tokens are sent to, of the same rows; None: those that the routers choose.
    """
    made, total, count, nll = Reference([]), 0.0, 0, 0.0
    for r, row in enumerate(rows):
        whole: list[Tensor] = []
        chosen: list[Tensor] = []
        for where, weight in _samples(row):
            forced = None if routed_as is None else [x[where] for x in routed_as.chosen[r]]
            with Routing(experts, forced) as routing:
                outputs = _outputs(model, row["tokens"][where])
            labels = row["labels"][where]
            whole = _put(whole, where, outputs, len(row["tokens"]), 0)
            chosen = _put(chosen, where, routing.chosen, len(row["tokens"]), -1)
            # The drop-in function shifts labels; pad one position on each so that the labels stay where they are.
            padded = torch.nn.functional.pad(outputs[-1], (0, 0, 0, 1))
            part = batch_sum(objective, padded[None], torch.nn.functional.pad(labels, (1, 0), value=IGNORE_INDEX)[None])
            total, count = total + weight * part.loss.item(), count + part.count
            nll += torch.nn.functional.cross_entropy(outputs[-1].double(), labels, reduction="sum").item()
            made.tokens += int((labels != IGNORE_INDEX).sum())
        made.outputs.append(whole)
        made.chosen.append(chosen)
    made.loss, made.lm_loss = total / max(count, 1), nll / max(made.tokens, 1)
    return made


def load(folder: Path, config: ModelConfig, *, pretrained: bool, seed: int) -> torch.nn.Module:
    """Return the model in fp32: loaded by transformers, or filled by tensor name with a checkpoint or random weights.

    Raises:
        UserError: the folder's checkpoint is damaged.
    """
    import transformers

    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": "eager", "local_files_only": True}
    kind = getattr(transformers, config.architecture)
    if pretrained and not hub.checkpoints_of(folder):
        loaded: torch.nn.Module = kind.from_pretrained(folder, use_safetensors=True, **options)
        return loaded.eval()
    source = open_source(folder if pretrained else None, config, seed)
    state = {t.name: source(t, None, 0, 0).float() for t in places(config)}
    of_files = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    # transformers joins the experts' tensors as it loads them.
    model: torch.nn.Module = kind.from_pretrained(None, config=of_files, state_dict=state, **options)
    return model.eval()


def _put(whole: list[Tensor], where: slice, parts: list[Tensor], length: int, empty: int) -> list[Tensor]:
    """Return `whole`, tensors [length, ...] of `empty` at first, with a sample's part of each put in its place."""
    whole = whole or [x.new_full((length, x.shape[-1]), empty) for x in parts]
    for target, x in zip(whole, parts, strict=True):
        target[where] = x
    return whole


def _samples(row: Row) -> Iterator[tuple[slice, float]]:
    """Yield each sample's slice of its row, padding included, and its weight."""
    edges = row["cu_seqlens"].tolist() if "cu_seqlens" in row else [0, len(row["tokens"])]
    for k in range(int(row["samples"])):
        yield slice(edges[k], edges[k + 1]), float(row["weight"][k])


def _outputs(model: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
    """Return the outputs for tokens [n]: [n, h] for each stage, [n, v] for the logits, fp32."""
    inner: Any = model.model  # the decoder that transformers' causal models keep under this name
    inner = getattr(inner, "language_model", inner)  # beside a vision part
    found: list[Tensor] = []

    def keep(_: torch.nn.Module, __: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        found.append((output if isinstance(output, Tensor) else output[0])[0].float())

    hooks = [m.register_forward_hook(keep) for m in (inner.embed_tokens, *inner.layers, inner.norm)]
    try:
        logits = model(input_ids=tokens[None], use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, logits[0].float()]
