"""A probe of Megatron's training loop: it names storages and passes for the ledger and stops after the second step."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bft_megatron.plan.memory import HEAD, Ledger, Moments
from bft_megatron.upstream import training_loop


@dataclass(frozen=True)
class Trace:
    """The memory, messages and kernels of a rank's step. Sizes in bytes."""

    rank: int
    parameters: int
    expert_parameters: int
    """Those that expert parallelism shares out, of `parameters`."""
    layers: int
    micro_batches: int
    """Micro-batches of the traced step; all work but that done once a step grows with their number."""
    at_rest: Counter[str]
    """Bytes by part before the step: weights, gradients, optimizer and anything else that stays."""
    after_forward: int
    """Bytes that the first micro-batch keeps for its backward pass."""
    step: Moments


class Enough(Exception):
    """The traced step is over; raised to end Megatron's loop."""


class StepProbe:
    """An observer of Megatron's loop that tells the ledger the current part and phase."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.steps, self.forwards, self.backwards = ledger, 0, 0, 0
        self.at_rest: Counter[str] = Counter()
        self.after_forward = 0
        self.chunks: list[Any] = []
        self.optimizer: Any = None

    def install(self) -> None:
        """Wrap the loop's set-up, its steps and their passes for the rest of this process."""
        training_loop.SETUP.after(self._built)
        training_loop.TRAIN_STEP.around(self._step)
        training_loop.FORWARD_PASS.around(self._forward)
        training_loop.BACKWARD_PASS.around(self._backward)

    def _built(self, built: Any) -> None:
        self.chunks, self.optimizer, _ = built
        for chunk in self.chunks:
            self._name_parts(chunk)
        self._name_states()
        training_loop.UPDATE.around(self._update, on=self.optimizer)

    def _name_states(self) -> None:
        """Assign weights, gradients and optimizer state to their parts, wherever they were allocated."""
        parameters = [p for chunk in self.chunks for p in chunk.parameters()]
        self.ledger.assign((p.data for p in parameters), "weights")
        self.ledger.assign((p.main_grad for p in parameters if getattr(p, "main_grad", None) is not None), "gradients")
        for single in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            adam = single.optimizer
            if adam is None:
                continue
            mains = [p for group in adam.param_groups for p in group["params"]]
            own = {p.untyped_storage()._cdata for p in parameters}  # fp32 main parameters may be views of the model's
            mains = [p for p in mains if p.untyped_storage()._cdata not in own]
            states = [t for state in adam.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
            self.ledger.assign(iter([*mains, *states]), "optimizer")

    def _name_parts(self, chunk: torch.nn.Module) -> None:
        """Assign allocations while a layer runs to its activations, and those after the last layer to the head."""
        from megatron.core.utils import unwrap_model

        model, ledger = unwrap_model(chunk), self.ledger

        def enter(part: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if ledger.phase == "forward":  # not while activations are recomputed in a backward pass
                    ledger.part = part

            return hook

        for layer in model.decoder.layers:
            layer.register_forward_pre_hook(enter(f"activations of layer {layer.layer_number}"))
            layer.register_forward_hook(enter("activations"))
        if model.pre_process:
            model.embedding.register_forward_pre_hook(enter("activations of the embedding"))
            model.embedding.register_forward_hook(enter("activations"))
        if model.post_process:
            model.decoder.register_forward_hook(enter(HEAD))

    @contextmanager
    def _update(self) -> Iterator[None]:
        self.ledger.mark("update")
        with self.ledger.within("update", "update"):
            yield

    @contextmanager
    def _forward(self) -> Iterator[None]:
        before = self.ledger.now
        with self._pass("forward", "activations"):
            yield
        if not self.after_forward and self.steps == 1:
            self.after_forward = self.ledger.now - before

    @contextmanager
    def _backward(self) -> Iterator[None]:
        with self._pass("backward", "backward"):
            yield

    @contextmanager
    def _pass(self, name: str, part: str) -> Iterator[None]:
        self.ledger.mark(name)
        with self.ledger.within(part, name):
            yield
        self.ledger.mark("between passes")

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Record one training step; the second is the last, and its record is kept."""
        gc.collect()  # frees reference cycles of the step before
        self._name_states()
        self.ledger.begin()
        self.at_rest = +self.ledger.total
        with self.ledger.within("between passes", "step"):
            yield
        self.steps += 1
        if self.steps == 2:
            raise Enough

    def trace(self, rank: int) -> Trace:
        """Return the trace of the recorded step."""
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.core.utils import unwrap_model

        return Trace(
            rank,
            sum(p.numel() for chunk in self.chunks for p in chunk.parameters()),
            sum(p.numel() for chunk in self.chunks for p in chunk.parameters() if not getattr(p, "allreduce", True)),
            sum(len(unwrap_model(chunk).decoder.layers) for chunk in self.chunks),
            get_num_microbatches(),
            self.at_rest,
            self.after_forward,
            self.ledger.step,
        )
