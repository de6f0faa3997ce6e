"""A run that asks for kernels which are not installed is refused before its ranks start, with what installs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bft_megatron.errors import FieldError
from bft_megatron.installation import layers, parts
from bft_megatron.recipe import reader
from tests.helpers.commands import ROOT
from tests.installation.test_doctor import distribution

without = pytest.mark.skipif(parts.version("transformer-engine") is not None, reason="Transformer Engine is installed")


def check(*words: str) -> FieldError:
    with pytest.raises(FieldError) as refused:
        layers.check(reader.load(ROOT / "recipes/tiny.yaml", [*words]))
    return refused.value


@without
@pytest.mark.parametrize(
    "flag",
    [
        "fp8-format=hybrid",
        "tp-comm-overlap=true",
        "cpu-offloading-num-layers=2",
        "use-precision-aware-optimizer=true",
        "moe-router-fusion=true",
        "moe-permute-fusion=true",
    ],
)
def test_flags_of_transformer_engine_name_the_command_that_installs_it(flag: str):
    error = check(f"megatron.{flag}")
    assert error.field == f"megatron.{flag.partition('=')[0]}"
    assert f"not installed: {layers.INSTALL} installs it" in error.message
    assert (ROOT / layers.INSTALL).exists()


@without
def test_what_is_turned_off_or_needs_nothing_is_not_refused():
    words = ["megatron.fp8-format=null", "megatron.moe-permute-fusion=false", "megatron.optimizer-cpu-offload=true"]
    layers.check(reader.load(ROOT / "recipes/tiny.yaml", [*words, "megatron.use-precision-aware-optimizer=true"]))


@pytest.mark.parametrize(("backend", "place"), [("deepep", "DeepEP;"), ("hybridep", "DeepEP/tree/hybrid-ep;")])
def test_a_dispatcher_without_its_package(backend: str, place: str):
    words = ("megatron.moe-token-dispatcher-type=flex", f"megatron.moe-flex-dispatcher-backend={backend}")
    assert f"not installed: https://github.com/deepseek-ai/{place}" in check(*words).message


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Transformer Engine of release 2.5, as far as its metadata go."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").write_text("")
    distribution(tmp_path, "transformer-engine", "2.5.0+cu12")
    monkeypatch.syspath_prepend(tmp_path)


@without
@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fp8-format=hybrid"], ("fp8-recipe", "delayed needs GPUs from sm_89 on, and this machine has sm_80")),
        (["fp8-format=e4m3", "fp8-recipe=mxfp8"], ("fp8-recipe", "mxfp8 needs GPUs from sm_100 on, below sm_120, and")),
    ],
)
def test_gpus_that_do_not_compute_in_fp8(
    words: list[str], said: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 9.0\necho 8.0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    error = check(*(f"megatron.{word}" for word in words))
    assert error.field == f"megatron.{said[0]}"
    assert error.message.startswith(said[1])
    tool.write_text("#!/bin/sh\necho 10.0\n")
    layers.check(reader.load(ROOT / "recipes/tiny.yaml", [f"megatron.{word}" for word in words]))


@without
@pytest.mark.usefixtures("engine")
def test_an_older_transformer_engine_and_a_variable_that_it_reads(monkeypatch: pytest.MonkeyPatch):
    assert check("megatron.moe-router-fusion=true").message.startswith(
        "needs Transformer Engine 2.7, and 2.5.0+cu12 is"
    )
    monkeypatch.delenv("NVTE_CPU_OFFLOAD_V1", raising=False)
    words = "megatron.fine-grained-activation-offloading=true"
    assert "export NVTE_CPU_OFFLOAD_V1=1" in check(words).message
    monkeypatch.setenv("NVTE_CPU_OFFLOAD_V1", "1")
    layers.check(reader.load(ROOT / "recipes/tiny.yaml", [words]))
