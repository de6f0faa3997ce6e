"""Flags that Transformer Engine or a dispatcher alone obeys are refused where they would fail late or do nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bft_megatron.errors import FieldError
from bft_megatron.hf.architectures import read_config
from bft_megatron.recipe import engine_rules, reader
from tests.helpers.commands import ROOT

FP8 = "megatron.fp8-format=hybrid"
ANYWHERE = {
    "scaling-without-format": (["megatron.fp8-recipe=mxfp8"], "fp8-recipe", "does nothing without fp8-format"),
    "fp4-scaling-with-fp8": ([FP8, "megatron.fp4-recipe=nvfp4"], "fp4-recipe", "does nothing without fp4-format"),
    "ends-in-bf16-without-format": (
        ["megatron.first-last-layers-bf16=true"],
        "first-last-layers-bf16",
        "does nothing without fp8-format",
    ),
    "ends-in-bf16-with-the-default-scaling": (
        [FP8, "megatron.first-last-layers-bf16=true"],
        "first-last-layers-bf16",
        "set fp8-recipe to tensorwise, blockwise or mxfp8",
    ),
    "recomputed-norm-with-the-default-scaling": (
        [FP8, "megatron.recompute-granularity=selective", "megatron.recompute-modules=[layernorm]"],
        "recompute-modules",
        "not with fp8-recipe delayed",
    ),
    "both-formats": ([FP8, "megatron.fp4-format=e2m1"], "fp4-format", "fp8-format is set too"),
    "fp32": ([FP8, "train.precision=fp32"], "fp8-format", "needs train.precision: bf16"),
    "custom": ([FP8, "megatron.fp8-recipe=custom"], "fp8-recipe", "custom needs fp8-quantizer-factory"),
    "rows": ([FP8, "data.seq_length=120"], "data.seq_length", "gives a rank 120 tokens a micro-batch; fp8 multiplies"),
    "rows-in-blocks": (
        [FP8, "megatron.fp8-recipe=mxfp8", "data.seq_length=48"],
        "data.seq_length",
        "multiples of 32",
    ),
    "parameters": (
        [FP8, "megatron.fp8-param-gather=true"],
        "fp8-param-gather",
        "the optimizer would begin with the weights from before the model's are read",
    ),
    "megatrons-name": (
        ["parallel.context=2", "megatron.cp-comm-type=allgather"],
        "cp-comm-type",
        "must be one of p2p, a2a, all_gather, a2a+p2p, not 'allgather'",
    ),
    "heads": (["parallel.context=4", "megatron.cp-comm-type=a2a"], "cp-comm-type", "4 does not divide the 2"),
    "some-layers": (["parallel.context=2", "megatron.cp-comm-type=[p2p, a2a]"], "cp-comm-type", "the model has 4"),
    "no-levels": (
        ["parallel.context=4", "megatron.cp-comm-type=a2a+p2p"],
        "cp-comm-type",
        "needs hierarchical-context",
    ),
    "levels": (
        ["parallel.context=4", "megatron.hierarchical-context-parallel-sizes=[2, 4]"],
        "hierarchical-context-parallel-sizes",
        "must be two numbers whose product is parallel.context, 4",
    ),
    "offload": (
        ["megatron.optimizer-cpu-offload=true"],
        "optimizer-cpu-offload",
        "needs use-precision-aware-optimizer",
    ),
    "overlap": (["megatron.tp-comm-overlap=true"], "tp-comm-overlap", "needs parallel.tensor above 1"),
    "fsdp": (
        ["megatron.use-megatron-fsdp=true"],
        "use-megatron-fsdp",
        "the exact divisor, the checkpoints and the exp",
    ),
}


@pytest.mark.parametrize("case", ANYWHERE)
def test_flags_that_contradict_others_are_refused_on_any_machine(case: str, refused: Callable[..., str]):
    words, flag, why = ANYWHERE[case]
    said = refused(*words)
    assert flag in said
    assert why in said


@pytest.mark.parametrize("words", [("device=cpu",), ("layers=torch",)], ids=str)
@pytest.mark.parametrize(
    "flag",
    [
        "fp8-format=hybrid",
        "fp4-format=e2m1",
        "tp-comm-overlap=true",
        "cpu-offloading-num-layers=2",
        "fine-grained-activation-offloading=true",
        "te-precision-config-file=precision.yaml",
    ],
)
def test_what_only_transformer_engines_layers_obey_is_refused_with_others(
    words: tuple[str, ...], flag: str, refused: Callable[..., str]
):
    said = refused(*words, f"megatron.{flag}")
    assert f"Transformer Engine's layers alone obey it, and {words[0].replace('=', ' is ')}" in said


@pytest.mark.parametrize("flag", ["profile", "record-memory-history", "gpu-sniff-test-interval"])
def test_what_would_end_a_run_on_the_cpu_is_refused_there(flag: str, refused: Callable[..., str]):
    assert f"megatron.{flag}=1: is for GPUs, and device is cpu" in refused("device=cpu", f"megatron.{flag}=1")


def test_rows_are_long_enough_for_every_tensor_ranks_share():
    words = ["parallel.tensor=4", "data.seq_length=48", "train.precision=bf16", "device=auto", FP8]
    with pytest.raises(FieldError, match="gives a rank 48 tokens a micro-batch; fp8 multiplies multiples of 32"):
        engine_rules.check(reader.load(ROOT / "recipes/tiny.yaml", words), read_config(ROOT / "recipes/tiny"))


EXPERTS = f"model={ROOT / 'recipes/tiny_moe'}"
DISPATCHERS = {
    "backend-alone": (
        ["megatron.moe-flex-dispatcher-backend=hybridep"],
        "moe-flex-dispatcher-backend",
        "does nothing without moe-token-dispatcher-type: flex",
    ),
    "one-rank": (
        ["megatron.moe-token-dispatcher-type=flex"],
        "moe-token-dispatcher-type",
        "flex needs parallel.expert above 1",
    ),
    "buffers": (
        [
            *("parallel.data=2", "parallel.expert=2"),
            *("megatron.moe-token-dispatcher-type=flex", "megatron.moe-flex-dispatcher-backend=ncclep"),
        ],
        "moe-flex-dispatcher-backend",
        "ends the run where a rank's experts get more tokens than its buffer holds",
    ),
}


@pytest.mark.parametrize("case", DISPATCHERS)
def test_dispatchers_that_would_do_nothing_or_end_a_run_are_refused(case: str, refused: Callable[..., str]):
    words, flag, why = DISPATCHERS[case]
    said = refused(EXPERTS, *words)
    assert flag in said
    assert why in said
