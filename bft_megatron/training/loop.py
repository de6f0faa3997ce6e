"""One rank of a run: from a checked recipe to Megatron's `pretrain`.

`train` sets up, in this order, the device, the process group, the step and its reports, the changes to Megatron
(`install`), the arguments and the model, and then runs the loop.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import torch.distributed as dist

from bft_megatron.checkpoint.gate import Gate
from bft_megatron.checkpoint.hf_copies import HFCopies
from bft_megatron.checkpoint.recovery import newest_whole
from bft_megatron.checkpoint.retention import Retention
from bft_megatron.checkpoint.saving import Saving
from bft_megatron.checkpoint.stopping import Stop
from bft_megatron.checkpoint.streak import Streak
from bft_megatron.errors import BlownUp, FieldError
from bft_megatron.hf.megatron_flags import megatron_flags
from bft_megatron.processes import ranks, signals
from bft_megatron.reporting.announce import notes, sentence
from bft_megatron.reporting.expert_load import ExpertLoad
from bft_megatron.reporting.peak import report_peak
from bft_megatron.reporting.reporter import Reporter
from bft_megatron.reporting.totals import Meter
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.resolved import Run
from bft_megatron.training import arguments, communicators, initialize, kernels, measuring
from bft_megatron.training.balance import loss_scale
from bft_megatron.training.datasets import datasets, rows_of_step
from bft_megatron.training.head import untested_card
from bft_megatron.training.model import model_config
from bft_megatron.training.step import Step
from bft_megatron.upstream import (
    bucket_padding,
    checkpoint_writer,
    command_line,
    expert_optimizers,
    signal_handler,
)
from bft_megatron.upstream.training_loop import TrainingLoop


def train(run: Run, console: TextIO) -> None:
    """Train this rank's share to the end of the run, from the newest intact checkpoint of its folder.

    Args:
        console: the terminal, for the lines that a user reads; all other output goes to stdout.

    Raises:
        FieldError: Megatron does not have a flag under `megatron:`, or the kernels need a GPU and there is none.

    Environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, as torchrun and launch/ set them.
    """
    recipe, folder = run.recipe, run.folder
    on_cpu = initialize.runs_on_cpu(recipe)
    if on_cpu and recipe.objective.kernels == "triton":
        raise FieldError("objective.kernels", "triton runs on GPUs alone, and this run is on the CPU; use torch")
    initialize.join(recipe, on_cpu)
    arguments.check_passed_through(recipe)
    keep = Retention(recipe.train.keep_last, recipe.train.keep_best, run.best_metric)
    start = newest_whole(folder, console)
    if start >= run.steps:  # the run was killed after its last save, before it was marked as done
        return finish(folder, None, None)
    if ranks.rank() == 0:
        announce(run, start, on_cpu, console)
    meter = Meter(recipe.data.most_sources)
    mixture = run.config.experts is not None
    step = Step(recipe.objective, run.config.vocab_size, measuring.into(meter), mask_padding=mixture)
    reporter = Reporter(meter, folder.metrics, console, step.objective.name, run.steps, *run.rows.sources_apart)
    reporter.rows_of = rows_of_step(run)
    streak = Streak(folder, start, recipe.train.max_skipped, lambda: meter.totals)
    gate = Gate(streak, run.steps, console)
    stop = Stop(reporter, run.steps, recipe.train.exit_after)
    copies = HFCopies(folder, console) if recipe.train.save_hf and dist.get_rank() == 0 else None
    install(reporter, stop, streak, gate, Saving(folder, keep, copies, start), start)
    margs = command_line.parse(
        arguments.megatron_arguments(
            recipe,
            megatron_flags(run.config),
            initialize.device_flags(recipe, experts=run.config.experts is not None),
            run.steps,
            (run.validation.batch, run.validation.iterations),
        )
    )
    fill = start == 0 or recipe.lora is not None  # a LoRA run's checkpoints hold only its adapters
    model = model_config(recipe, run.config, run.model_folder, margs, on_cpu, fill=fill)
    model.pre_wrap_hooks.append(communicators.warm_up)
    reporter.load = with_experts(model, run, step, reporter) if mixture else None
    model.transformer.finalize_model_grads_func = measuring.finalize_grads(meter, reporter.load)
    with situation(run, reporter, step, streak):
        with stops(stop):
            pretrain(margs, model, step, datasets(run))
        if not stop.reason:
            gate.check_end(run.steps)
    if not on_cpu:
        report_peak(folder, console)
    if gate.refused:
        streak.record()
    stopped = f"{stop.reason}, not saved: {gate.refused}" if gate.refused else stop.reason
    finish(folder, keep if streak.is_vouched_for else None, stopped)
    if stopped and dist.get_rank() == 0:
        how = f"; the same command goes on {next_start(folder)}"
        saved = ": saved, not finished; the same command goes on"
        print(f"{stopped}{how if gate.refused else saved}", file=console, flush=True)
    dist.destroy_process_group()
    if copies:
        copies.stop() if stop.reason else copies.complete()


def with_experts(model: Any, run: Run, step: Step, reporter: Reporter) -> ExpertLoad:
    """Make a mixture's `GPTModelConfig` count its experts' load and weigh its routers' own losses; return the load."""
    from bft_megatron.training import routers

    load = ExpertLoad(*routers.sizes(run.config))
    routers.install(model, run.recipe, load)
    if run.recipe.moe.balance or run.recipe.moe.z_loss:
        scale = loss_scale(run, step.objective.reduce)
        model.transformer.moe_grad_scale_func = lambda: scale(reporter.iteration + 1)
    return load


def announce(run: Run, start: int, on_cpu: bool, console: TextIO) -> None:
    """Print the first lines of the run, and what a GPU does more slowly than it could."""
    print(sentence(run, start), *notes(run), sep="\n", file=console, flush=True)
    if not on_cpu:
        experts, delta_nets = run.config.experts is not None, run.config.linear_attention is not None
        torch_layers = initialize.torch_layers(run.recipe)
        layers = kernels.missing(torch_layers=torch_layers, experts=experts, delta_nets=delta_nets)
        for line in [*layers, *untested_card(run.recipe.objective)]:
            print(line, file=console, flush=True)


def install(reporter: Reporter, stop: Stop, streak: Streak, gate: Gate, saving: Saving, start: int) -> None:
    """Make the changes that a run needs in Megatron, in the order required. Issues no collective.

    `initialize.join` makes one change before all of these: on the CPU it redirects `torch.cuda`, before the group of
    all ranks is formed and before any code asks for a device.

    Args:
        reporter, streak, saving: hear of the steps, in this order.
        stop: is asked after each step.
        gate: is asked before each save, if the folder is still this run's own.
        start: the iteration that the run resumes from, or 0.
    """
    # Before the arguments are parsed, because `--exit-signal-handler` makes Megatron handle SIGTERM itself.
    signal_handler.ask(stop.asked)
    # Before the first save, which would start Megatron's helper process.
    checkpoint_writer.without_helper_process()
    checkpoint_writer.name_causes()
    # Before the first save or load of an optimizer.
    bucket_padding.mend()
    expert_optimizers.install()
    # Before the first event, which writes a line: the lines of steps that run again must be dropped first.
    reporter.begin(start)
    # Before `pretrain`, which looks up the loop's functions as it calls them.
    loop = TrainingLoop(start)
    loop.on_start.append(reporter.started)
    loop.on_step.append(lambda _: signals.hold())  # from the first step on there is something to save
    loop.on_step += [reporter.stepped, streak.stepped, saving.stepped]
    loop.on_validation += [reporter.validated, streak.validated]
    loop.on_save += [stop.saved, saving.saved, streak.saved]
    loop.may_save = saving.while_ours(gate.allows)
    loop.install()


def finish(folder: RunFolder, keep: Retention | None, stopped: str | None) -> None:
    """Mark the run as done, or as unfinished with the reason, once all ranks have arrived. Collective: a barrier.

    Args:
        keep: the checkpoints to keep of a run that is done; None keeps all, as nothing shows that the last one is good.
        stopped: why it stopped early, or None.
    """
    dist.barrier()
    if dist.get_rank() != 0:
        return
    if stopped:
        folder.mark_unfinished(stopped)
    else:
        folder.mark_done()
        if keep:
            keep.apply(folder, wait=True)  # the last validation decides which checkpoints to delete


def next_start(folder: RunFolder) -> str:
    """Return where the next start begins, in words."""
    again = folder.saved_iteration()
    return f"from the checkpoint of step {again}" if again else "from the beginning: nothing was saved"


@contextlib.contextmanager
def stops(stop: Stop) -> Iterator[None]:
    """Allow Megatron's `sys.exit` only where `stop` asked for it, and with status 0.

    Megatron leaves its loop by `sys.exit`, in some cases of failure with status 0 too.

    Raises:
        RuntimeError: Megatron exited for another reason.
    """
    try:
        yield
    except SystemExit as e:
        if not stop.reason or e.code:
            raise RuntimeError(f"Megatron ended the run with status {e.code}; the log says why") from None


@contextlib.contextmanager
def situation(run: Run, reporter: Reporter, step: Step, streak: Streak) -> Iterator[None]:
    """Add notes to an exception of the run: its step, the rows of its micro-batch, and where the next start resumes.

    After a blow-up the mark of an unfinished run says so.
    """
    try:
        yield
    except BaseException as e:  # torch's CheckpointException is no Exception
        e.add_note(f"after step {reporter.iteration}")
        if step.rows:
            e.add_note(f"rows of its micro-batch: {', '.join(map(str, step.rows))} of {run.recipe.data.train}")
        e.add_note(f"next start: {next_start(run.folder)}")
        if isinstance(e, BlownUp):
            tell_blow_up(e, run.folder, streak)
        raise


def tell_blow_up(e: BlownUp, folder: RunFolder, streak: Streak) -> None:
    """Name the checkpoint to go back to if no step from the newest was finite; mark the run on rank 0."""
    newest, *older = [*sorted(folder.iterations(), reverse=True), 0]
    if streak.skipped and newest == streak.last and any(older):
        e.add_note(f"no step from it was finite: to go back to step {older[0]}, remove {folder.checkpoint(newest)}")
    if dist.get_rank() == 0:
        folder.mark_unfinished(f"blown up: {e}")


def pretrain(margs: Any, model: Any, step: Step, provider: Callable[..., Any]) -> None:
    """Run Megatron's own training loop."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        container = pretrain_cfg_container_from_args(margs, model)
        pretrain(container, provider, ModelType.encoder_or_decoder, step.forward)
