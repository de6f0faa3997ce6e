"""Checkpoints and validations: their intervals, and which checkpoints are kept."""

from __future__ import annotations

import math

from bft_megatron.llamafactory.conversion import Conversion

_USUAL_STEPS = 500  # transformers' default


def carry(to: Conversion) -> None:
    """Convert the save_* and eval_* fields. Call it after `data.carry` and `training.carry`."""
    _carry_checkpoints(to)
    _carry_validation(to)


def _carry_checkpoints(to: Conversion) -> None:
    config = to.config
    every = _carry_interval(to, "save_strategy", "steps", "save_steps", _USUAL_STEPS)
    if every:
        to.carry("checkpoints", f"every {every} steps", "train.save_every", every)
    if config.given("save_total_limit"):
        to.carry_field("checkpoints", "save_total_limit", "train.keep_last", config.integer("save_total_limit", 2))
    elif every:
        to.show("checkpoints", "all are kept", "train.keep_last 2, the default")


def _carry_validation(to: Conversion) -> None:
    config = to.config
    strategy = "eval_strategy" if config.given("eval_strategy") else "evaluation_strategy"
    by_logging = config.raw(strategy) == "steps" and not config.given("eval_steps")  # as in transformers
    every = _carry_interval(to, strategy, "no", "logging_steps" if by_logging else "eval_steps", _USUAL_STEPS)
    best, metric = config.flag("load_best_model_at_end"), config.text("metric_for_best_model", "loss")
    if "data.valid" not in to.fields:
        if every:
            to.lose(strategy, f"there is no data.valid; with one, set train.validate_every {every}")
        if best:
            to.lose("load_best_model_at_end", "there is no data.valid; with one, set train.keep_best 1")
        return
    if every:
        to.carry("validation", f"every {every} steps", "train.validate_every", every)
    else:
        to.show("validation", "none", "before the first step and after the last")
    if not best:
        return
    saves = to.fields.get("train.save_every")
    if not every or not saves or saves % every:
        to.lose(
            "load_best_model_at_end", "only a step that is validated can be best: save_steps a multiple of eval_steps"
        )
        return
    to.carry("best checkpoint", "load_best_model_at_end", "train.keep_best", 1)
    if metric in ("loss", "eval_loss"):
        to.carry("best checkpoint", "metric_for_best_model loss", "train.best_metric", "loss")
    else:
        to.lose("metric_for_best_model", "train.best_metric takes loss, lm_loss, mean_p or accuracy")


def _carry_interval(to: Conversion, strategy: str, usual: str, name: str, default: int) -> int | None:
    """Return the steps between two saves or validations; None if only the last step has one, or if it is unknown."""
    config = to.config
    steps: int | None = to.fields.get("train.iterations")
    chosen = usual if config.raw(strategy) is None else config.raw(strategy)
    if chosen in ("no", False):  # YAML reads a bare `no` as False
        return None
    if chosen != "steps":
        to.lose(strategy, "saves and validations are some steps apart: train.save_every, train.validate_every")
        return None
    every = config.number(name, default)
    if not 0 < every < 1:
        return config.integer(name, default)
    if steps is None:
        to.lose(name, "is a share of the steps, whose number depends on the data: give it in steps")
        return None
    return math.ceil(every * steps)
