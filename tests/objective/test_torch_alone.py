"""The objective is usable where torch, and what torch itself asks for, is all that is installed."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.commands import ROOT

SCRIPT = """
import re, sys
from importlib.metadata import requires

named = [re.match(r"[\\w.-]+", text)[0].lower().replace("-", "_") for text in requires("torch")]
indirect = ["torch", "torchgen", "functorch", "numpy", "mpmath", "markupsafe"]
ALLOWED = {*sys.stdlib_module_names, *named, *indirect, "bft_megatron"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED and not name.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"not installed here: {name}", name=name)

sys.meta_path.insert(0, Refuse())
try:
    import transformers
except ModuleNotFoundError:
    pass
else:
    sys.exit("transformers was not refused")

import torch
import bft_megatron.objective
from bft_megatron.objective import linear_logprobs, logprobs, loss, records, view

hidden, weight = torch.randn(6, 1, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
labels = torch.tensor([[3], [1], [-100], [5], [0], [-100]])
logp = linear_logprobs.vocab_parallel_linear_logprobs(hidden, weight, labels)[:, 0]
other = logprobs.vocab_parallel_logprobs(hidden @ weight.T, labels)[:, 0]
assert (logp - other).abs().max() < 1e-5
geometry = view.Geometry(labels[:, 0], torch.tensor([0, 3, 6]), torch.ones(2) > 0, torch.ones(2))
for objective in (records.sft, records.dft, records.bft):
    total = loss.objective_sum(objective, geometry, geometry.view(logp), logp)
    total.loss.backward(retain_graph=True)
    assert total.count == (2 if objective.reduce == "samples" else 4)
assert weight.grad.abs().sum() > 0
print("done")
"""


def test_nothing_else_is_imported():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
