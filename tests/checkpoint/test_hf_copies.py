"""`train.save_hf`: at the end of a run there is one copy a kept checkpoint, whole, and nothing else."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bft_megatron.checkpoint.hf_copies import HFCopies
from bft_megatron.hf.export import export
from bft_megatron.run.folder import RunFolder
from tests.helpers.commands import run_command


@pytest.mark.slow
def test_every_kept_checkpoint_has_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """The first checkpoint is deleted while it is exported or before: no copy of it stays, and nobody is told of it."""
    words = (
        "train.iterations=2",
        "train.warmup_iterations=0",
        "train.save_every=1",
        "train.keep_last=1",
        "train.save_hf=true",
    )
    folder = RunFolder(tmp_path / "run")
    assert run_command(monkeypatch, "train", "recipes/tiny.yaml", "device=cpu", f"output={folder.root}", *words) == 0
    assert sorted(f.name for f in folder.hf_copies.iterdir()) == ["iter_0000002"]
    export(folder.checkpoints, tmp_path / "expected", folder.model)
    expected, copy = (load_file(f / "model.safetensors") for f in (tmp_path / "expected", folder.hf_copy(2)))
    assert expected.keys() == copy.keys()
    assert all(torch.equal(copy[name], value) for name, value in expected.items())
    assert "no Hugging Face copy" not in capfd.readouterr().out

    shutil.rmtree(folder.hf_copies)
    (folder.checkpoint(2) / "__0_0.distcp").write_bytes(b"")
    console = io.StringIO()
    HFCopies(folder, console).complete()
    assert not list(folder.hf_copies.iterdir())
    assert console.getvalue().startswith("no Hugging Face copy of step 2: ")
    assert "a file is missing or broken" in console.getvalue()
