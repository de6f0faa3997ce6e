"""Megatron's own training loop on one rank of a cluster that is not there: two steps over tensors without values.

The recipe goes the way of a real run, `arguments` and `train.pretrain` with our step, in a process whose process group
is torch's fake one. For GPUs the CUDA surface is redirected to torch's meta device, and the layers are `modelled`; for
a recipe of the CPU the CPU's own layers run under FakeTensorMode, since torch chooses its CPU kernels by device. The
first step makes the optimizer's state, the second is what is looked at.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from bft_megatron import arguments, train
from bft_megatron.cpu import backend
from bft_megatron.data.dataset import VIRTUAL_LENGTH
from bft_megatron.hf import architectures
from bft_megatron.hf.architectures import ModelConfig
from bft_megatron.metrics import Meter
from bft_megatron.plan.memory import HEAD, Ledger, Moments
from bft_megatron.recipe import Recipe
from bft_megatron.step import Step

LEFT_OUT = (
    "--save",
    "--load",
    "--save-interval",
    "--tensorboard-dir",
    "--exit-signal-handler",
    "--use-cpu-initialization",
)
"""Flags of a run that a plan does without."""
INSTEAD = ("--num-workers", "0", "--disable-gloo-process-groups")
MANY = 1_000_000
"""Iterations of the schedule, of which two are run: more than any warm-up has."""


@dataclass(frozen=True)
class Trace:
    """What a rank's step holds, sends and computes. Sizes in bytes."""

    rank: int
    parameters: int
    layers: int
    micro_batches: int
    """That the traced step had; all but what is done once a step grows with it."""
    at_rest: Counter[str]
    """By part, before the step: weights, gradients, optimizer and what else stays."""
    after_forward: int
    """What the first micro-batch keeps for its backward pass."""
    step: Moments


def replace_what_needs_values() -> None:
    """Functions of torch and Megatron that look at values, or at other ranks', where it cannot be answered by a 0."""
    from megatron.core.optimizer import clip_grads
    from megatron.training import training

    def all_gather_object(gathered: list[Any], own: Any, group: dist.ProcessGroup | None = None) -> None:
        gathered[:] = [own] * len(gathered)  # which parameter groups there are: on every rank the same

    reduce_success = training.logical_and_across_model_parallel_group

    def successful(own: bool, **groups: Any) -> bool:
        reduce_success(own, **groups)
        return own

    def one_by_one(messages: list[dist.P2POp]) -> list[Any]:  # together they would ask for the device's back end
        return [m.op(m.tensor, m.peer, group=m.group, tag=m.tag) for m in messages]

    dist.all_gather_object, dist.batch_isend_irecv = all_gather_object, one_by_one
    training.logical_and_across_model_parallel_group = successful
    clip_grads.multi_tensor_applier = lambda operator, flag, tensors, *args: operator(0, flag, tensors, *args)
    clip_grads.multi_tensor_scale_tensor_impl = None
    clip_grads.l2_norm_impl = lambda _, __, gradients, *___: (gradients[0][0].new_zeros(1), None)
    torch.is_autocast_enabled = lambda *_: False  # the meta device is not among those it knows


class _Enough(Exception):
    """The step that was to be looked at is over."""


def run(
    recipe: Recipe,
    config: ModelConfig,
    rank: int,
    world: int,
    provider: Callable[..., Any],
) -> Trace:
    """Trace one rank's step. In a process of its own: Megatron's state is global.

    Args:
        recipe: checked, for this world.
        config: of the model.
        provider: of the data set, as Megatron calls it: `full_rows`, or the run's own.

    Raises:
        FieldError: a flag under `megatron:` that Megatron does not have.
        Exception: whatever Megatron refuses.
    """
    on_cpu = recipe.device == "cpu"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    backend.install("cpu" if on_cpu else "meta")
    join(rank, world)
    replace_what_needs_values()
    arguments.check_passed_through(recipe)
    flags = arguments.megatron_arguments(
        recipe,
        architectures.megatron_flags(config),
        train.device_flags(on_cpu),
        iterations=MANY,
        validation=(0, 0),
    )
    step = Step(recipe.objective, config.vocab_size, Meter(recipe.data.most_sources))
    ledger = Ledger("cpu" if on_cpu else "meta", kind_of_group)
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) if on_cpu else contextlib.nullcontext()
    with fake, ledger:
        if not on_cpu:
            from bft_megatron.plan import modelled

            modelled.install()
        margs = train.parse([*_without(flags, LEFT_OUT), *INSTEAD])
        margs.do_train = True  # which it would read from a tensor
        model = train.model_config(recipe, config, None, margs, on_cpu, fresh=False)
        model.transformer.finalize_model_grads_func = step.finalize_grads
        if not on_cpu:
            model.transformer_layer_spec = modelled.layer_spec
        if recipe.lora is not None:
            del model.pre_wrap_hooks[0]  # would fill the frozen weights, which have no values here
        watch = _Watch(ledger)
        watch.install()
        with contextlib.suppress(_Enough):
            train.pretrain(margs, model, step, provider)
    return watch.trace(rank)


def join(rank: int, world: int) -> None:
    """Form a group of which no other rank exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())


def kind_of_group(name: str) -> tuple[str, int]:
    """A process group's name -> tp, cp, pp, dp or world, and its size."""
    from megatron.core import parallel_state as state

    groups = {
        "tp": state.get_tensor_model_parallel_group,
        "cp": state.get_context_parallel_group,
        "pp": state.get_pipeline_model_parallel_group,
        "dp": lambda: state.get_data_parallel_group(with_context_parallel=True),
        "dp ": state.get_data_parallel_group,
    }
    for kind, of in groups.items():
        with contextlib.suppress(AssertionError):
            if of().group_name == name:
                return kind.strip(), of().size()
    return "world", dist.get_world_size()


def _without(flags: list[str], names: tuple[str, ...]) -> list[str]:
    """The argument list less some flags and their values."""
    kept, skipping = [], False
    for word in flags:
        if word.startswith("--"):
            skipping = word in names
        if not skipping:
            kept.append(word)
    return kept


class _Watch:
    """Tells the ledger what is going on, by replacing functions that Megatron looks up when it calls them."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.steps, self.forwards, self.backwards = ledger, 0, 0, 0
        self.at_rest: Counter[str] = Counter()
        self.after_forward = 0
        self.chunks: list[Any] = []
        self.optimizer: Any = None

    def install(self) -> None:
        from megatron.core.pipeline_parallel import schedules
        from megatron.training import training

        training.setup_model_and_optimizer = self._after(training.setup_model_and_optimizer, self._built)
        training.train_step = self._step(training.train_step)
        schedules.forward_step = self._pass(schedules.forward_step, "forward", "activations")
        schedules.backward_step = self._pass(schedules.backward_step, "backward", "backward")

    def _after(self, call: Callable[..., Any], then: Callable[[Any], None]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            then(result)
            return result

        return called

    def _built(self, built: Any) -> None:
        self.chunks, self.optimizer, _ = built
        for chunk in self.chunks:
            self._name_parts(chunk)
        self._name_states()
        self.optimizer.step = self._named(self.optimizer.step, "update")

    def _name_states(self) -> None:
        """Weights, gradients and optimizer state by what they are, wherever they were made."""
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
        """While a layer runs, what is born belongs to its activations; after the last one, to the head."""
        from megatron.core.utils import unwrap_model

        model, ledger = unwrap_model(chunk), self.ledger

        def enter(part: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if ledger.phase == "forward":  # and not computed again in a backward pass
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

    def _named(self, call: Callable[..., Any], what: str) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.ledger.mark(what)
            with self.ledger.within(what, what):
                return call(*args, **kwargs)

        return called

    def _pass(self, call: Callable[..., Any], what: str, part: str) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.ledger.mark(what)
            before = self.ledger.now
            with self.ledger.within(part, what):
                result = call(*args, **kwargs)
            if what == "forward" and not self.after_forward and self.steps == 1:
                self.after_forward = self.ledger.now - before
            self.ledger.mark("between passes")
            return result

        return called

    def _step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            gc.collect()  # cycles of what the step before left
            self._name_states()
            self.ledger.begin()
            self.at_rest = +self.ledger.total
            with self.ledger.within("between passes", "step"):
                result = train_step(*args, **kwargs)
            self.steps += 1
            if self.steps == 2:
                raise _Enough
            return result

        return called

    def trace(self, rank: int) -> Trace:
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.core.utils import unwrap_model

        return Trace(
            rank,
            sum(p.numel() for chunk in self.chunks for p in chunk.parameters()),
            sum(len(unwrap_model(chunk).decoder.layers) for chunk in self.chunks),
            get_num_microbatches(),
            self.at_rest,
            self.after_forward,
            self.ledger.step,
        )


def full_rows(recipe: Recipe) -> Callable[..., Any]:
    """A provider of rows that a single sample fills, all of it learned: what needs the most of everything."""
    s = recipe.data.seq_length
    row = {
        "tokens": torch.zeros(s, dtype=torch.int64),
        "labels": torch.zeros(s, dtype=torch.int64),
        "position_ids": torch.arange(s),
        "weight": torch.ones(1),
        "samples": torch.tensor(1),
        "real_tokens": torch.tensor(s),
        "row": torch.tensor(0),
        "source": torch.tensor(0),
    }
    if recipe.data.packing:
        row |= {"cu_seqlens": torch.tensor([0, s], dtype=torch.int32), "max_seqlen": torch.tensor(s)}

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return VIRTUAL_LENGTH

        def __getitem__(self, _: int) -> dict[str, torch.Tensor]:
            return row

    def provide(*_: Any, vp_stage: int | None = None) -> tuple[Any, None, None]:
        return Rows(), None, None

    provide.is_distributed = True
    return provide
