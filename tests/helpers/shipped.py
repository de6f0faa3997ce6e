"""The shipped recipes, each with its number of GPUs, and the variants of them that their comments propose."""

from __future__ import annotations

from tests.helpers.commands import ROOT

RECIPES = ROOT / "recipes"

# recipe -> GPUs that its first lines name
SHIPPED = {
    "llama31_8b": 8,
    "llama31_70b": 64,
    "llama31_405b": 128,
    "qwen25_7b": 8,
    "qwen25_32b": 16,
    "qwen3_8b": 8,
    "qwen3_30b_a3b": 16,
    "qwen3_235b_a22b": 128,
    "qwen35_9b": 8,
    "qwen35_27b": 16,
    "qwen35_35b_a3b": 16,
    "qwen35_122b_a10b": 64,
    "mixtral_8x7b": 16,
    "hunyuan_a13b": 32,
    "glm45_air": 32,
}

# What the recipes' comments propose for another number of GPUs.
VARIANTS = {
    "llama31_70b on 4 nodes": (
        "llama31_70b",
        32,
        ["data.seq_length=4096", "parallel.context=1", "megatron.grad-reduce-in-bf16=true"],
    ),
    "llama31_8b with fp32 gradients": (
        "llama31_8b",
        8,
        ["parallel.tensor=2", "megatron.grad-reduce-in-bf16=false"],
    ),
    "llama31_8b with the optimizer in host memory": (
        "llama31_8b",
        8,
        ["megatron.optimizer-cpu-offload=true", "megatron.use-precision-aware-optimizer=true"],
    ),
    "llama31_70b with recompute": ("llama31_70b", 64, ["megatron.recompute-granularity=selective"]),
    "llama31_405b on 32 nodes": ("llama31_405b", 256, []),
    "qwen3_8b on 4": ("qwen3_8b", 4, []),
    "qwen3_8b at 32k": (
        "qwen3_8b",
        8,
        ["data.seq_length=32768", "parallel.context=2", "train.global_batch_size=8"],
    ),
}
CASES = {name: (name, gpus, []) for name, gpus in SHIPPED.items()} | VARIANTS
