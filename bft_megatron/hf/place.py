"""The names of a pipeline chunk's parameters in the whole model."""

from __future__ import annotations

import re
from dataclasses import dataclass

# In the local layer spec the norms of a dense layer are separate modules, in Transformer Engine's they are part of the
# next linear layer.
_INPUT_NORM = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
_DELTA_NORM = {"input_layernorm.weight": "self_attention.in_proj.layer_norm_weight"}
_DENSE_NORM = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}


@dataclass(frozen=True)
class Place:
    """The part of the model that a rank's pipeline chunk holds."""

    layers: tuple[int, ...]
    """Numbers of its layers, from 0 over the model."""
    mixtures: frozenset[int] = frozenset()
    """Those of its layers that have experts."""
    delta_nets: frozenset[int] = frozenset()
    """Those of its layers that have a gated delta net in place of attention."""
    first_expert: int = 0
    """Number of the rank's first expert in each of its layers."""

    def path(self, parameter: str) -> str:
        """Return the `Weight.path` of a parameter of the chunk, by its name in the chunk."""
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", parameter)
        if match is None:
            return parameter
        layer, name = self.layers[int(match[1])], match[2]
        norms = _DELTA_NORM if layer in self.delta_nets else _INPUT_NORM
        if layer not in self.mixtures:
            norms = norms | _DENSE_NORM
        return f"decoder.layers.{layer}.{norms.get(name, self._of_expert(name))}"

    def _of_expert(self, name: str) -> str:
        """Return a name with the expert's number over the whole layer; another name as it is."""
        for local in (
            r"mlp\.experts\.local_experts\.(?P<i>\d+)\.(?P<matrix>linear_fc\d)\.weight",  # SequentialMLP
            r"mlp\.experts\.(?P<matrix>linear_fc\d)\.weight(?P<i>\d+)",  # TEGroupedMLP
        ):
            if match := re.fullmatch(local, name):
                return f"mlp.experts.{self.first_expert + int(match['i'])}.{match['matrix']}.weight"
        return name
