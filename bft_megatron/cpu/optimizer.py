"""What Megatron's distributed optimizer needs to save and resume with torch's Adam.

Megatron 0.19.2 resumes with apex's or Transformer Engine's fused Adam, which keep one step count a parameter group.
torch's Adam, the one without a GPU, keeps a tensor a parameter, and five places of
`core/optimizer/distrib_optimizer.py` go wrong with it; each is named below by what fails without it. Nothing here
changes an update.
"""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Replace three methods of `DistributedOptimizer`; a second call does nothing."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as Optimizer

    if getattr(Optimizer, "_resumes_with_torch_adam", False):
        return
    Optimizer._resumes_with_torch_adam = True
    state_dict, load_state_dict = Optimizer.state_dict, Optimizer.load_state_dict
    set_states = Optimizer._set_main_param_and_optimizer_states

    def state_dict_of_any_age(self: Any) -> dict[str, Any]:
        _fill_empty_state(self.optimizer)
        return state_dict(self)

    @torch.no_grad()  # fp32 main parameters are views of the model's: loading writes into leaves that require grad
    def load_with_own_steps(self: Any, state: dict[str, Any]) -> None:
        step = float(state["optimizer"]["param_groups"][0]["step"])
        load_state_dict(self, state)
        # Megatron leaves *one* tensor shared by all parameters, which Adam would advance once a parameter, and in the
        # dp_reshardable format puts the old count back: the first loss after a resume is right, the second is not.
        for own in self.optimizer.state.values():
            own["step"] = torch.tensor(step)

    def set_states_but_step(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        # The fully reshardable format has no "step" (a KeyError); only tensors are copied, so None keeps the one loaded
        # above.
        set_states(self, model_param, {**tensors, "step": None})

    Optimizer.state_dict = state_dict_of_any_age
    Optimizer.load_state_dict = load_with_own_steps
    Optimizer._set_main_param_and_optimizer_states = set_states_but_step


def _fill_empty_state(adam: torch.optim.Optimizer) -> None:
    """Adam before its first step has no state, and Megatron asserts on exactly one step count at every load."""
    for group in adam.param_groups:
        for p in group["params"]:
            if not adam.state[p]:
                adam.state[p] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
