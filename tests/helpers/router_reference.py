"""The routers of the first step in plain float64: their losses by the definition, and the tokens of their experts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from bft_megatron.data.dataset import training_rows
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.prepared import prepare_rows


class Routers:
    """What the routers of a recipe's first step do; after `add_gradients` also the load of their experts."""

    def __init__(self, made: Recipe) -> None:
        self.made, self.config = made, read_config(find_model(made.model))
        assert self.config.experts is not None
        self.experts = self.config.experts
        self.layers = [i for i in range(self.config.layers) if self.config.has_experts(i)]
        self.loads: Tensor | None = None
        """[layers with experts, experts]"""

    def add_gradients(self, model: torch.nn.Module) -> torch.nn.Module:
        """Leave the gradients of the routers' losses in a model."""
        total, tokens, loads = torch.zeros((), dtype=torch.float64), 0, []
        for logits in _rows_logits(self.made, model):  # one tensor [n, E] a layer
            n = len(logits[0])
            tokens += n
            loads.append(torch.stack([self._chosen(of_layer) for of_layer in logits]))
            for of_layer, chosen in zip(logits, loads[-1], strict=True):
                f = chosen / (n * self.experts.per_token)
                balance = self.experts.count * (f * of_layer.softmax(-1).mean(0)).sum()
                z = of_layer.logsumexp(-1).square().mean()
                total = total + n * (self.made.moe.balance * balance + self.made.moe.z_loss * z)
        (total / tokens).backward()
        self.loads = torch.stack(loads).sum(0).double()
        return model

    def report(self) -> dict[str, float]:
        """What a step's line must say of the load."""
        assert self.loads is not None
        over_mean = self.loads.amax(1) / self.loads.mean(1)
        return {"expert_load": float(over_mean.max()), "expert_load_layer": self.layers[int(over_mean.argmax())]}

    def _chosen(self, logits: Tensor) -> Tensor:
        indices = logits.topk(self.experts.per_token).indices
        return torch.bincount(indices.flatten(), minlength=self.experts.count)


def _rows_logits(made: Recipe, model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Of each row of the first step that has samples: the router's logits [n, E] of its tokens in each layer."""
    folder = find_model(made.model)
    prepared = prepare_rows(made, folder, read_config(folder).vocab_size)
    rows = training_rows(prepared.train, seed=made.train.seed, limit=prepared.total)
    for row in (rows[i] for i in range(made.train.global_batch_size)):
        edges = row["cu_seqlens"].tolist() if "cu_seqlens" in row else [0, len(row["tokens"])]
        samples = []
        for a, b in pairwise(edges):
            text = row["tokens"][a:b][~row["padding"][a:b]]
            if len(text):
                samples.append(model(text[None], output_router_logits=True).router_logits)
        if samples:
            yield [torch.cat(of_layer) for of_layer in zip(*samples, strict=True)]
