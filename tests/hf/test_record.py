"""A record that is broken is found, and what keeps it from being read is told apart."""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bft_megatron.hf.record import crc_fault, load
from tests.helpers.commands import ROOT
from tests.helpers.world import run_world

TENSOR = torch.arange(7.0)


def _record(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _loads(file: Path, length: int) -> bool:
    try:
        assert torch.equal(load(file, 3, length), TENSOR)
    except (OSError, MemoryError, AssertionError):
        raise
    except Exception:  # whatever torch says of a broken archive
        return False
    return True


@pytest.mark.filterwarnings("ignore")
def test_any_bit_of_the_directory_is_found_by_its_checksums_by_torch_or_changes_nothing(tmp_path: Path):
    """Torch writes the directory without a checksum of its own; here in the entry of the tensor's data."""
    record, file, refused = _record(TENSOR), tmp_path / "__0_0.distcp", 0
    end = record.rindex(b"archive/data/0")
    for bit in range(8 * record.rindex(b"PK\x01\x02", 0, end), 8 * end):
        flipped = bytearray(record)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(b"xyz" + flipped + b"next")
        refused += bool(crc_fault(file, 3, len(record))) or not _loads(file, len(record))
    assert refused > 100


def test_a_member_marked_as_a_folder_is_a_fault(tmp_path: Path):
    """Without its bytes torch returns whatever was in memory."""
    record, file = bytearray(_record(TENSOR)), tmp_path / "__0_0.distcp"
    record[record.rindex(b"PK\x01\x02", 0, record.rindex(b"archive/data/0")) + 38] ^= 0x10
    file.write_bytes(record)
    assert crc_fault(file, 0, len(record)) == "__0_0.distcp: record at 0: archive/data/0 is marked as a folder"


def _with_a_hole(value: Any) -> tuple[mmap.mmap, int, int]:
    """Put a record into memory and unmap a page in its middle -> the memory, its address, the record's length."""
    record = _record(value)
    memory = mmap.mmap(-1, len(record))
    memory.write(record)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    middle = start + len(record) // 2 // mmap.PAGESIZE * mmap.PAGESIZE
    assert libc.munmap(ctypes.c_void_p(middle), ctypes.c_size_t(mmap.PAGESIZE)) == 0
    return memory, start, len(record)


def _read_over_a_hole() -> list[int | None]:
    (_memory, *place), found = _with_a_hole(torch.zeros(1 << 18)), []
    for read in (load, crc_fault):
        try:
            read(Path("/proc/self/mem"), *place)
        except OSError as e:
            found.append(e.errno)
    return found


def test_an_input_output_error_in_the_middle_is_not_the_records_fault():
    """Torch's own code would tell of a missing attribute."""
    assert run_world(1, _read_over_a_hole) == [[errno.EIO, errno.EIO]]


def _read_without_memory(file: Path) -> str:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + (32 << 20), resource.RLIM_INFINITY))
    try:
        load(file, 0, file.stat().st_size)
    except MemoryError as e:
        return str(e)
    return "enough"


def test_a_lack_of_memory_is_not_the_records_fault(tmp_path: Path):
    """Torch's own code would tell of a RuntimeError. In a process of its own: what other tests have freed is enough."""
    file = tmp_path / "__0_0.distcp"
    file.write_bytes(_record(torch.zeros(1 << 24)))
    code = f"from tests.hf import test_record as t; print(t._read_without_memory(t.Path({str(file)!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "can't allocate memory" in done.stdout


def test_a_record_without_faults_is_read(tmp_path: Path):
    file, record = tmp_path / "__0_0.distcp", _record(TENSOR)
    file.write_bytes(b"xyz" + record + b"next")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert crc_fault(file, 3, len(record)) is None
        assert torch.equal(load(file, 3, len(record)), TENSOR)
