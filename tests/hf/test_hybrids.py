"""Hybrids of gated delta nets and attention: transformers' logits and every bit of the files, on any layout."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import sharded
from tests.helpers.sharded import Sharding
from tests.helpers.tiny_models import SavedModel
from tests.hf.test_load import check_logits

LAYOUTS = [Sharding(), Sharding(tp=2), Sharding(pp=2, vpp=2), Sharding(pp=2), Sharding(pp=2, first=1), Sharding(tp=2, pp=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits_are_those_of_transformers(layout: Sharding, hybrids: list[SavedModel]) -> None:
    check_logits(layout, hybrids)
