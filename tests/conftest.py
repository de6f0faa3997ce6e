"""Imports torch and Megatron once for the whole session; tests fork their worlds from here."""

from __future__ import annotations

import os
import warnings

import pytest
from hypothesis import settings

os.environ.update(
    OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1", CUDA_DEVICE_MAX_CONNECTIONS="1", TOKENIZERS_PARALLELISM="false"
)
os.environ["HF_HUB_OFFLINE"] = "1"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core.models.gpt
    import megatron.core.tokenizers.text  # what Megatron's start would import in every process
    import megatron.training
    import megatron.training.arguments  # noqa: F401
    import torch


pytest.register_assert_rewrite("tests.helpers")
pytest_plugins = ["tests.helpers.fixtures"]

# `make fuzz` looks for new ones
settings.register_profile("the same examples each time", derandomize=True, deadline=None)
if "FUZZ_SECONDS" not in os.environ:
    settings.load_profile("the same examples each time")

torch.set_num_threads(1)  # a forked child must not inherit a thread pool
