"""A prepared folder is what was written, or it is damaged: said, set aside and prepared anew."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from bft_megatron.data import intact, prepare
from bft_megatron.data.prepare import Prepared, load
from bft_megatron.errors import FieldError, Unreadable
from bft_megatron.reading import readers, sources
from bft_megatron.recipe.schema import DataSettings
from tests.helpers.material import TINY

SETTINGS = DataSettings(train=str(TINY / "train.jsonl"), seq_length=256)


def prepared(cache: Path, settings: DataSettings = SETTINGS) -> Prepared:
    return prepare.prepare(settings.train, TINY, settings, 4, cache)


def flip(file: Path, place: int) -> None:
    """Flip one bit, counted from the beginning of a file."""
    content = bytearray(file.read_bytes())
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)


def test_a_flipped_bit_of_prepared_json_is_found(tmp_path: Path) -> None:
    folder = prepared(tmp_path).folder
    whole, file = intact.read(folder), folder / "prepared.json"
    for place in range(0, 8 * file.stat().st_size, 11):
        flip(file, place)
        with pytest.raises(intact.Damaged, match=r"is damaged \(prepared\.json: .*run `bft-megatron prepare RECIPE`"):
            load(folder)
        flip(file, place)
    assert intact.read(folder) == whole


@pytest.mark.parametrize("name", ["samples.arrow", "rows.arrow"])
def test_a_flipped_bit_of_the_rows_is_found(tmp_path: Path, name: str) -> None:
    file = prepared(tmp_path).folder / name
    for place in random.Random(3).sample(range(8 * file.stat().st_size), 50):
        flip(file, place)
        with pytest.raises(intact.Damaged, match=rf"is damaged \({name}: bytes from 0 have CRC-32"):
            intact.check([file.parent])
        flip(file, place)
    intact.check([file.parent])


@pytest.mark.parametrize("name", ["samples.arrow", "rows.arrow", "prepared.json"])
@pytest.mark.parametrize("harm", ["empty", "short", "missing", "folder"])
def test_a_damaged_folder_is_set_aside_and_prepared_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, harm: str
) -> None:
    first = prepared(tmp_path)
    samples = Dataset.from_file(str(first.folder / "samples.arrow")).to_dict()
    for count in ("", ".2"):
        file = first.folder / name
        content = file.read_bytes()
        file.unlink()
        if harm == "folder":
            file.mkdir()
        elif harm != "missing":
            file.write_bytes(content[: len(content) // 2] if harm == "short" else b"")
        assert prepared(tmp_path) == first
        said = capsys.readouterr().out
        assert said.startswith(f"{first.folder} is damaged ({name}: ")
        assert said.endswith(f"renamed to damaged_{first.folder.name}{count}, preparing the source anew\n")
    intact.check([first.folder])
    assert Dataset.from_file(str(first.folder / "samples.arrow")).to_dict() == samples


def test_an_error_of_the_file_system_is_no_damage(tmp_path: Path) -> None:
    """The kernel gives EIO to a process that reads its own memory at an address that is not mapped."""
    folder = prepared(tmp_path).folder
    (folder / "prepared.json").unlink()
    (folder / "prepared.json").symlink_to("/proc/self/mem")
    with pytest.raises(Unreadable, match=r"prepared\.json: Input/output error; nothing was changed"):
        prepared(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_file_that_changes_while_it_is_prepared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    lines = Path(SETTINGS.train).read_text().splitlines(keepends=True)
    source.write_text("".join(lines[:20]))
    read = sources.read_file

    def grown(*arguments: object) -> object:
        with source.open("a") as file:
            file.write("".join(lines[20:]))
        return read(*arguments)

    settings = replace(SETTINGS, train=str(source))
    monkeypatch.setattr(sources, "read_file", grown)
    with pytest.raises(FieldError, match=r"rows\.jsonl changed while it was prepared: start again when nothing writes"):
        prepared(cache, settings)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(sources, "read_file", read)
    assert prepared(cache, settings).counts.samples == len(lines)


def test_the_hash_is_of_the_content_and_not_of_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(tmp_path / "one")
    monkeypatch.setattr(readers, "CHUNK_ROWS", 7)
    second = prepared(tmp_path / "other")
    files = [made.folder / "samples.arrow" for made in (first, second)]
    assert files[0].read_bytes() != files[1].read_bytes()
    assert first.content == second.content


def test_whatever_is_learned_is_in_the_hash(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}], "weight": 1}\n'
    found = set()
    for name, text in {
        "first": line * 2,
        "token": line.replace("b c", "b d") + line,
        "learned": line.replace('"a"}', '"a"}, {"role": "assistant", "content": "x", "weight": 0}') + line,
        "weight": line.replace('"weight": 1', '"weight": 2') + line,
        "order": line + line.replace('"weight": 1', '"weight": 2'),
        "number": line * 3,
    }.items():
        source.write_text(text)
        found.add(prepared(tmp_path / name, replace(SETTINGS, train=str(source))).content)
    source.write_text(line * 2)
    found.add(prepared(tmp_path / "rows", replace(SETTINGS, train=str(source), packing=False)).content)
    assert len(found) == 7
    shutil.copy(source, tmp_path / "copy.jsonl")
    again = prepared(tmp_path / "copy", replace(SETTINGS, train=str(tmp_path / "copy.jsonl")))
    assert again.content in found
