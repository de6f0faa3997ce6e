"""The ranks divide a checkpoint by blocks: together they read all of it, once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bft_megatron import checksums
from bft_megatron.checkpoint import integrity
from bft_megatron.checksums import Checksum, block_fault, checksum
from bft_megatron.hf.seal import SEAL, write_seal
from bft_megatron.run.folder import RunFolder

BLOCK = 1 << 16
WORLD = 3


@pytest.fixture
def checkpoint(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sealed in blocks so small that its files have many."""
    for module in (checksums, integrity):
        monkeypatch.setattr(module, "BLOCK", BLOCK)
    copy = tmp_path / "iter_0000006"
    shutil.copytree(RunFolder(undisturbed).checkpoint(6), copy)
    (copy / SEAL).unlink()
    write_seal(copy, {file.name: checksum(file) for file in copy.iterdir()})
    return copy


def test_a_flip_in_any_block_is_found_by_one_rank(checkpoint: Path):
    file = checkpoint / "__1_0.distcp"
    content = file.read_bytes()
    finders = set()
    for at in range(BLOCK // 2, len(content), BLOCK):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        found = [integrity.damage(checkpoint, rank, WORLD) for rank in range(WORLD)]
        named = [f"__1_0.distcp: bytes from {at // BLOCK * BLOCK:,} have" in str(fault) for fault in found]
        assert sum(named) == 1, found
        finders.add(named.index(True))
    assert len(content) > WORLD * BLOCK
    assert finders == set(range(WORLD))
    file.write_bytes(content)
    assert [integrity.damage(checkpoint, rank, WORLD) for rank in range(WORLD)] == [None] * WORLD


def test_a_file_that_grew_or_has_a_block_less_in_the_seal_is_damaged(checkpoint: Path):
    with (checkpoint / "__1_0.distcp").open("ab") as file:
        file.write(b"\0")
    assert "__1_0.distcp: " in str(integrity.damage(checkpoint))
    shorter = checksum(checkpoint / "__1_0.distcp").as_json()
    shorter["crc32"].pop()
    with pytest.raises(ValueError, match="blocks for"):
        Checksum.of_json(shorter)


def test_a_checksum_survives_json_and_finds_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checksums, "BLOCK", 4)
    file = tmp_path / "file"
    for content in (b"", b"1234", b"123456789"):
        file.write_bytes(content)
        made = Checksum.of_json(json.loads(json.dumps(checksum(file).as_json())))
        assert made == checksum(file)
        assert len(made.blocks) == -(-len(content) // 4)
    file.write_bytes(b"1234x6789")
    assert [block_fault(file, made, index) is None for index in range(3)] == [True, False, True]
