"""Whole runs of the tiny model on a layout, and what they leave: metrics by step, every parameter's first gradient."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.hf.tensors import Weight, part
from bft_megatron.hf.weights import weights
from bft_megatron.processes.terminal import output_to
from bft_megatron.recipe import layout_rules, reader, rules
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import RunRows, prepare_rows
from bft_megatron.run.resolved import Run
from bft_megatron.training import loop
from tests.helpers.world import run_world

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny.yaml"
MODEL = RECIPE.parent / "tiny"
CHANGING = {"step_seconds", "tokens_per_second"}


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups, and what else must not change a number."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence: bool = False
    expert: int = 1
    expert_tensor: int = 1
    micro_batch_size: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def __str__(self) -> str:
        names = {"tensor": "tp", "pipeline": "pp", "virtual_pipeline": "vpp", "context": "cp", "data": "dp"}
        names |= {"expert": "ep", "expert_tensor": "etp"}
        sizes = [f"{short}{getattr(self, name)}" for name, short in names.items() if getattr(self, name) > 1]
        sizes += ["sp"] * self.sequence + [f"mb{self.micro_batch_size}"] * (self.micro_batch_size > 1)
        return "-".join(sizes) or "one"


@dataclass(frozen=True)
class Case:
    """An objective over rows of a model, whatever the layout."""

    objective: str = "bft"
    reduce: str | None = None
    confidence: str = "geometric"
    cp_windows: str = "exact"
    packing: bool = True
    pad_multiple: int = 8
    model: str = "tiny"
    """The tiny Llama, or one of VARIANTS."""
    options: str = "{}"
    """`objective.options`, as a recipe has it."""

    def __str__(self) -> str:
        name = self.objective.rpartition(".")[2].partition(":")[0]
        windows = [] if self.cp_windows == "exact" else [self.cp_windows]
        kind = [] if self.confidence == "geometric" else [self.confidence]
        model = [] if self.model == "tiny" else [self.model]
        packing = "packed" if self.packing else "padded"
        return "-".join([*model, name, *([self.reduce] if self.reduce else []), *kind, *windows, packing])


HYBRID: dict[str, Any] = {
    # A sample's first output is its value times (query . key), which the norm after it may blow up, and with it any
    # rounding: not with these two.
    "initializer_range": 0.05,
    "rms_norm_eps": 1e-2,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    # A decay is drawn as transformers draws it, and most forget all within a token: their gradients are as small, and
    # sums of terms that cancel, to a sixtieth of their size. Of 12 heads each layer has some that remember; of 8
    # layer 1 has none, and transformers' own fp32 is 5e-3 off float64 in its A_log.
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 12,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    },
}
"""Gated delta nets with more value heads than key heads, of another size."""

VARIANTS = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "qwen3_moe_dense": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": False,
        "mlp_only_layers": [0],
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
    },
    "hunyuan": {
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "model_type": "hunyuan_v1_moe",
        "num_experts": 8,
        "moe_topk": [2, 2, 2, 2],
        "intermediate_size": 32,
        "head_dim": 16,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "glm": {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "n_group": 2,
        "topk_group": 1,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "hybrid": {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", **HYBRID},
    "hybrid_moe": {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        **HYBRID,
    },
    "next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [1],
        **HYBRID,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 24},
}
"""What the tiny Llama has not: QKV biases, a norm of each head with tied embeddings, a sliding window."""


@dataclass(frozen=True)
class Result:
    """What a run left."""

    train: list[dict[str, Any]]
    valid: list[dict[str, Any]]
    gradients: dict[str, Tensor] = field(repr=False, default_factory=dict)
    """By Hugging Face name, of the first step."""


def write_data(folder: Path) -> None:
    """The tiny conversations with weights of their own, and as a second source a few answers of one token; a model
    folder a variant.
    """
    random.seed(5)
    for split in ("train", "valid"):
        lines = [json.loads(line) for line in (MODEL / f"{split}.jsonl").read_text().splitlines()]
        short = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "A"}]} for q in "BCDEF"]
        for name, found in ((split, lines), (f"{split}_short", short)):
            with (folder / f"{name}.jsonl").open("w") as file:
                for row in found:
                    file.write(json.dumps(row | {"weight": round(random.uniform(0.2, 2), 3)}) + "\n")
    config = json.loads((MODEL / "config.json").read_text())
    for name, changes in VARIANTS.items():
        shutil.copytree(MODEL, folder / name)
        (folder / name / "config.json").write_text(json.dumps(config | changes))


def make_recipe(folder: Path, data: Path, case: Case, layout: Layout, steps: int, *overrides: str) -> Recipe:
    """The tiny recipe for a case on a layout, checked as the command line checks it; 0 steps: by its epochs."""
    objective = [f"objective.name={case.objective}", f"objective.confidence={case.confidence}"]
    objective += [f"objective.reduce={case.reduce}"] if case.reduce else []
    objective += [f"objective.options={case.options}"]
    made = reader.load(
        RECIPE,
        [
            f"model={MODEL if case.model == 'tiny' else data / case.model}",
            *(f"data.{split}={_sources(data, split)}" for split in ("train", "valid")),
            *(f"data.{name}={getattr(case, name)}" for name in ("packing", "pad_multiple")),
            *(f"parallel.{n}={getattr(layout, n)}" for n in vars(layout) if n != "micro_batch_size"),
            *objective,
            f"objective.cp_windows={case.cp_windows}",
            f"train.micro_batch_size={layout.micro_batch_size}",
            f"train.iterations={steps}" if steps else "train.iterations=null",
            "train.warmup_iterations=0",
            "train.save_every=1",
            "train.clip_grad=1e6",  # Adam's first moment then holds the gradient itself
            f"output={folder}",
            *overrides,
        ],
    )
    rules.check_recipe(made, read_config(find_model(made.model)))
    layout_rules.check_world(made, layout.world)
    return made


def _sources(data: Path, split: str) -> str:
    return f"[{{path: {data / split}.jsonl, name: long}}, {{path: {data / split}_short.jsonl, name: short}}]"


def run(made: Recipe, world: int, before: Callable[[], None] = lambda: None) -> Result:
    """Run a recipe over forked processes, from the newest checkpoint of its folder, and read what it left.

    `before` is called in each process first.
    """
    folder, model = RunFolder.of(made), find_model(made.model)
    prepared = prepare_rows(made, model, read_config(model).vocab_size)
    run_world(world, train_rank, made, prepared, before, megatron=True)
    return Result(*read_metrics(folder.metrics), gradients(folder.checkpoints / "iter_0000001", made))


def do_nothing() -> None:
    """Stand for what is called before a run."""


def train_rank(made: Recipe, prepared: RunRows, before: Callable[[], None]) -> None:
    """What the command does in a rank."""
    before()
    model = find_model(made.model)
    with output_to(RunFolder.of(made).log(int(os.environ["RANK"]))) as console:
        loop.train(Run(made, read_config(model), model, prepared, int(os.environ["WORLD_SIZE"])), console)


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of metrics.jsonl, training and validation apart, without the times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in CHANGING} for line in lines]
    return [k for k in kept if "split" not in k], [k for k in kept if "split" in k]


def gradients(checkpoint: Path, made: Recipe) -> dict[str, Tensor]:
    """Every parameter's gradient of step 1, whole, out of Adam's first moment: exp_avg = (1 - beta1) * gradient."""
    reader, prefix = dcp.FileSystemReader(checkpoint), "optimizer.state.exp_avg."
    metadata = reader.read_metadata().state_dict_metadata
    moments = {key: torch.empty(stored.size) for key, stored in metadata.items() if key.startswith(prefix)}
    dcp.load(moments, storage_reader=reader, no_dist=True)
    found = {}
    for weight in weights(read_config(find_model(made.model))):
        if weight.buffer:
            continue
        stored = [_moment(moments, prefix, part) for part in weight.stored]
        if stored[0] is None:  # of a frozen weight
            continue
        whole = torch.cat(stored)[: sum(t.shape[0] for t in weight.tensors)] / (1 - made.train.adam_beta1)
        for i, tensor in enumerate(weight.tensors):
            tensor.put(part(weight, i, whole), found.setdefault(tensor.name, torch.full(tensor.whole.shape, torch.nan)))
    return found


def _moment(moments: dict[str, Tensor], prefix: str, weight: Weight) -> Tensor | None:
    stacked = weight.name if weight.layer is None else f"decoder.layers.{weight.name}"
    if prefix + stacked in moments:
        whole = moments[prefix + stacked]
        whole = whole if weight.layer is None else whole[weight.layer]
    else:  # of a model whose layers differ
        whole = moments.get(f"{prefix}decoder.layers.{weight.layer}.{weight.name}")
    return whole if whole is None or weight.expert is None else whole[weight.expert]
