"""The estimated time of a step, from counted operations and messages and published speeds; never a measurement.

    step = (micro-batches + (PP - 1) / VP) * slowest stage's micro-batch + exposed DP traffic + update

A kernel takes the longer of the times of its FLOPs and its bytes, a message the time of its bytes on its link. The
shares below, of peak speeds that are reached and of messages that are hidden behind kernels, are assumptions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from bft_megatron.plan import layout
from bft_megatron.plan.hardware import Cluster, Gpu
from bft_megatron.plan.layout import Stage
from bft_megatron.plan.memory import Collective, Work
from bft_megatron.recipe.schema import Recipe

MATMUL_SHARE = 0.70
"""Share of the peak FLOP/s that large bf16 products reach."""
ATTENTION_SHARE = 0.50
EXPERTS_SHARE = 0.45
"""Share that the experts' grouped products reach, which are narrow and of unequal heights: an assumption. NVIDIA's
published Qwen3-30B-A3B in bf16 reaches 277 of an H100's 989 TFLOP/s in all, dense models of its makers about 400."""
DELTA_RULE_SHARE = 0.10
"""Share that the rule's products reach, which are small, and wait for the state before them. FlashQLA's published times
of flash-linear-attention on an H200, 32 heads over 8,192 tokens: 0.472 ms forward, 1.444 ms backward."""
SHARES = {"attention": ATTENTION_SHARE, "experts": EXPERTS_SHARE, "delta rule": DELTA_RULE_SHARE}
MEMORY_SHARE = 0.80
LINK_SHARE = 0.80
LATENCY = 15e-6
"""Seconds that the shortest message takes."""
FP32_SLOWDOWN = 15
"""Factor by which fp32 products are slower than bf16 ones, without TF32."""
SHOWN_BACKWARD = 1 / 3
"""Exposed share of TP's messages in a backward pass: Megatron hides four of a layer's six messages behind products."""


@dataclass(frozen=True)
class Estimate:
    """The estimate of a step; times in seconds."""

    seconds: float
    kernels: float
    """Kernels of the slowest stage, over all its micro-batches."""
    shown: dict[str, float]
    """Exposed communication of the slowest stage by group: tp, cp, pp, ep (with etp), dp (with edp)."""
    head_shown: float
    """The part of `shown` that the output layer and the objective issue."""
    bubble: float
    update: float
    tokens_per_second: float
    """Tokens per second and GPU."""
    model_flops: float
    """FLOPs of a step: three times the forward pass, without recomputation."""
    mfu: float
    sent: dict[str, float]
    """Bytes that a GPU of the slowest stage sends in a step, by group."""


def estimate(recipe: Recipe, stages: list[Stage], on: Cluster, load: float = 1.0) -> Estimate:
    """Estimate a step's time on a cluster from its traced stages, by the module's formula.

    Args:
        load: the load of the experts with which the stages were traced; the other ranks wait for the fullest.
    """
    gpu, world = on.gpu, on.world
    speeds = Speeds(recipe, gpu, world, on.gpus_per_node)
    times = [_StageTimes.of(recipe, stage, speeds) for stage in stages]
    slowest = max(times, key=lambda t: t.micro_batch)
    total = layout.micro_batches(recipe, world)
    parallel = recipe.parallel
    bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline * slowest.micro_batch
    update = max(t.update for t in times)
    dp = max(t.shown_dp for t in times)
    seconds = total * slowest.micro_batch + bubble + dp + update
    tokens = recipe.train.global_batch_size * recipe.data.seq_length
    flops = _model_flops(recipe, stages, world, load)
    return Estimate(
        seconds=seconds,
        kernels=total * slowest.kernels,
        shown={group: total * t for group, t in slowest.shown.items()} | {"dp": dp},
        head_shown=total * max(t.head_shown for t in times),
        bubble=bubble,
        update=update,
        tokens_per_second=tokens / seconds / world,
        model_flops=flops,
        mfu=flops / seconds / world / gpu.flops,
        sent=_sent(slowest.stage, total),
    )


class Speeds:
    """The seconds of kernels and messages on this hardware and layout."""

    def __init__(self, recipe: Recipe, gpu: Gpu, world: int, gpus_per_node: int) -> None:
        self.gpu = gpu
        reach = {  # ranks from the first to the last of a group, in Megatron's order
            "tp": recipe.parallel.tensor,
            "cp": recipe.parallel.tensor * recipe.parallel.context,
            "dp": world // recipe.parallel.pipeline,
            "ep": recipe.parallel.expert * recipe.parallel.expert_tensor,
            "etp": recipe.parallel.expert_tensor,
            "edp": world // recipe.parallel.pipeline,
            "pp": world,
            "world": world,
        }
        self.links = {group: gpu.nvlink if n <= gpus_per_node else gpu.network for group, n in reach.items()}

    def kernel(self, work: Work) -> float:
        peak = self.gpu.flops / (1 if work.dtype in ("bfloat16", "float16") else FP32_SLOWDOWN)
        share = SHARES.get(work.kind, MATMUL_SHARE)
        return max(work.flops / (peak * share), work.bytes / (self.gpu.hbm * MEMORY_SHARE))

    def message(self, message: Collective) -> float:
        if message.size < 2 or message.operator in ("recv_", "barrier"):
            return 0.0
        return LATENCY + wire_bytes(message) / (self.links[message.group] * LINK_SHARE)


def wire_bytes(message: Collective) -> float:
    """Return the bytes that a rank sends for a message, with ring algorithms."""
    n = max(message.size, 1)
    if message.operator in ("recv_", "barrier"):
        return 0.0
    if message.operator.startswith("allreduce"):
        return 2 * (n - 1) / n * message.bytes
    if any(name in message.operator for name in ("gather", "scatter", "alltoall")):
        return (n - 1) / n * message.bytes
    return message.bytes if n > 1 else 0.0


@dataclass(frozen=True)
class _StageTimes:
    """The seconds of one micro-batch on a stage, unless a field says otherwise."""

    stage: Stage
    kernels: float
    shown: dict[str, float]
    head_shown: float
    shown_dp: float
    """Seconds of a step."""
    update: float
    """Seconds of a step."""

    @property
    def micro_batch(self) -> float:
        return self.kernels + sum(self.shown.values())

    @staticmethod
    def of(recipe: Recipe, stage: Stage, speeds: Speeds) -> _StageTimes:
        step, held = stage.trace.step, stage.trace.micro_batches

        def kernels(wanted: Callable[[str, Work], bool]) -> float:
            return sum(n * speeds.kernel(work) for (phase, work), n in step.work.items() if wanted(phase, work))

        def messages(wanted: Callable[[str, Collective], bool]) -> float:
            return sum(n * speeds.message(m) for (phase, m), n in step.collectives.items() if wanted(phase, m))

        def tp(own: str) -> float:
            return messages(lambda phase, m: phase == own and m.group == "tp") / held

        passes = ("forward", "backward")

        def cp(*, ring: bool) -> float:
            """Return the time of attention's ring, or of gated delta nets' exchanges."""
            own = messages(
                lambda phase, m: phase in passes and m.group == "cp" and not m.head and (m.operator == "send") == ring
            )
            return own / held

        forward = kernels(lambda phase, _: phase == "forward") / held
        backward = kernels(lambda phase, _: phase == "backward") / held
        attention = kernels(lambda phase, work: phase in passes and work.kind == "attention") / held
        cp_head = messages(lambda phase, m: phase in passes and m.group == "cp" and m.head) / held
        tp_head = messages(lambda phase, m: phase == "forward" and m.group == "tp" and m.head) / held
        pp = messages(lambda _, m: m.group == "pp" and m.operator == "send") / held
        experts = messages(lambda phase, m: phase in passes and m.group in ("ep", "etp")) / held
        reduce = messages(lambda _, m: m.group in ("dp", "edp") and "scatter" in m.operator)
        gather = messages(lambda _, m: m.group in ("dp", "edp") and "gather" in m.operator)
        shown_reduce = max(0.0, reduce - backward) if recipe.megatron.get("overlap-grad-reduce") else reduce
        shown_gather = max(0.0, gather - forward) if recipe.megatron.get("overlap-param-gather") else gather
        return _StageTimes(
            stage,
            kernels=forward + backward,
            shown={
                "tp": tp("forward") + SHOWN_BACKWARD * tp("backward"),
                "cp": max(0.0, cp(ring=True) - attention) + cp(ring=False) + cp_head,
                "ep": experts,
                "pp": pp if recipe.parallel.virtual_pipeline == 1 else 0.0,
            },
            head_shown=tp_head + cp_head,
            shown_dp=shown_reduce + shown_gather,
            update=kernels(lambda phase, _: phase == "update"),
        )


def _model_flops(recipe: Recipe, stages: list[Stage], world: int, load: float) -> float:
    """Return the FLOPs of a step over all micro-batches, stages and ranks; of experts, those that tokens reach."""
    per_rank = sum(
        stage.count * n * work.flops / (load if work.kind == "experts" else 1) / stage.trace.micro_batches
        for stage in stages
        for (phase, work), n in stage.trace.step.work.items()
        if phase == "forward"
    )
    return 3 * per_rank * layout.micro_batches(recipe, world) * (world // recipe.parallel.pipeline)


def _sent(stage: Stage, total: int) -> dict[str, float]:
    sent: defaultdict[str, float] = defaultdict(float)
    for (phase, message), n in stage.trace.step.collectives.items():
        scale = total / stage.trace.micro_batches if _grows(phase, message) else 1
        sent[message.group] += n * scale * wire_bytes(message)
    return dict(sent)


def _grows(phase: str, message: Collective) -> bool:
    """Return whether the number of these messages grows with the number of micro-batches."""
    return message.group in ("tp", "cp", "pp", "ep", "etp") and (
        phase in ("forward", "backward") or message.operator == "send"
    )
