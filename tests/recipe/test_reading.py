"""Whatever is wrong with a recipe, or with a path in it, is one line that names file, line and field."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bft_megatron.errors import FieldError
from bft_megatron.recipe import rules
from bft_megatron.recipe.reader import dump, load
from bft_megatron.recipe.schema import DataSettings, Recipe
from tests.helpers.commands import ROOT, run_command

Refused = Callable[..., str]

NESTED = "[" * 900 + "]" * 900
LAUGHS = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9) if i else 1}]\n" for i in range(8))

WRONG = [
    ("output: ${oc.env:NOPE_NOT_SET}", "output: the environment variable NOPE_NOT_SET is not set"),
    ("output: ${output}", "output: refers to itself"),
    ("output: ${", "output: "),
    ("output: \\${x}", "output: must not hold `${`"),
    ("output: ${nope}", "output: "),
    ("null: 3", "a field's name must be text: put null in quotes"),
    ("3: 3", "a field's name must be text: put 3 in quotes"),
    ("? [a]\n: 3", "a field's name must be text"),
    ("megatron: !!set {a}", "megatron: no field takes a value of the kind !!set"),
    ("megatron: !!python/object/apply:os.system [x]", "megatron: no field takes a value of the kind !!python/object"),
    (f"megatron: {NESTED}", "nested deeper than 50 levels"),
    ("megatron: &a {b: *a}", "megatron.b: an alias of what it is in"),
    ("megatron: [1]", "megatron: must be flags by name"),
    ("megatron: ${train}", "megatron: must be flags by name"),
    ('device: "\x07"', "not YAML: the character #x0007 in it"),
    ("device: [", "not YAML: "),
    ("device: auto\ndevice: cpu", "not YAML: found duplicate key device"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[text[:20] for text, _ in WRONG])
def test_yaml_that_is_no_recipe(recipe: Path, refused: Refused, text: str, message: str):
    field = text.partition(":")[0]
    kept = "".join(f"{line}\n" for line in recipe.read_text().splitlines() if not line.startswith(f"{field}:"))
    recipe.write_text(f"{text}\n{kept}" if field not in ("device", "output") else f"{kept}{text}\n")
    place, _, said = refused().partition(": ")
    line = place.removeprefix(f"{recipe}:")
    assert line.isdigit(), place
    assert message in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: é".encode("latin-1"), "not UTF-8 at byte 8: save it as UTF-8"),
        ("model: é".encode("utf-16"), "not UTF-8 at byte 1: save it as UTF-8"),
        (bytes(range(256)), "not UTF-8 at byte 129"),
        (b"\0\0\0", ":1: not YAML: the character #x0000 in it"),
        (b"", "must be a mapping of fields"),
        (b"- model", "must be a mapping of fields"),
        (LAUGHS.encode(), "values with the aliases: at most 100,000 are read"),
    ],
)
def test_a_file_that_is_no_recipe(recipe: Path, refused: Refused, content: bytes, message: str):
    recipe.write_bytes(content)
    said = refused()
    assert said.startswith(str(recipe))
    assert message in said


def test_a_byte_order_mark_is_read_over(recipe: Path, refused: Refused):
    recipe.write_bytes(b"\xef\xbb\xbf" + recipe.read_bytes())
    assert refused("train.lr=0").startswith("train.lr=0: must be above 0")


def test_no_recipe_at_all(recipe: Path, refused: Refused):
    recipe.unlink()
    assert refused() == f"{recipe}: cannot be read: No such file or directory"
    recipe.mkdir()
    assert refused() == f"{recipe}: cannot be read: Is a directory"


def test_every_unknown_field_is_reported_at_once(recipe: Path, refused: Refused):
    recipe.write_text(recipe.read_text().replace("seq_length", "seq_lenght").replace("iterations", "itertions"))
    first, second, third = refused("objective.gama=2").splitlines()
    assert first == f"{recipe}:5: data.seq_lenght: unknown field; did you mean `data.seq_length`?"
    assert second == f"{recipe}:8: train.itertions: unknown field; did you mean `train.iterations`?"
    assert third == "objective.gama=2: unknown field; did you mean `objective.gamma`?"


@pytest.mark.parametrize(
    "override",
    [
        "train.lr",
        "=1",
        "train.lr=[",
        "train.lr=${",
        "train.lr=!!set {a}",
        "train..lr=1",
        "a[=1",
        "train=1",
        "data=x",
        "train.lr=" + NESTED,
        "train.lr=&a [*a]",
        "lora.rank=${lora.rank}",
        "train.lr={null: 1}",
        "megatron.x[0].y=1",
    ],
)
def test_overrides_that_cannot_be_read(refused: Refused, override: str):
    assert refused(override).startswith(override[:190])


def test_environment_variables_and_other_fields_may_be_named(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RATE", "0.25")
    made = load(recipe, ["train.lr=${oc.env:RATE}", "train.min_lr=${train.lr}"])
    assert (made.train.lr, made.train.min_lr) == (0.25, 0.25)


def test_a_path_may_begin_at_home(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Where the recipe is read, so that config.yaml names the folder itself. Another file is reached as ./~."""
    monkeypatch.setenv("HOME", "/homes/me")
    names = ["model=~/m", "output='~'", "data.chat_template=~/t", "lora.adapter=~/a", "data.train=~/x.jsonl"]
    made = load(recipe, [*names, "data.valid=['~/v', {path: '~/w/*', weight: 1}, './~', 'a~']"])
    (tmp_path / "config.yaml").write_text(dump(made))
    monkeypatch.setenv("HOME", "/homes/another")
    again = load(tmp_path / "config.yaml")
    assert again == made
    assert (made.model, made.output, made.data.chat_template) == ("/homes/me/m", "/homes/me", "/homes/me/t")
    assert made.lora is not None
    assert made.lora.adapter == "/homes/me/a"
    assert [s.path for s in made.data.sources("train")] == ["/homes/me/x.jsonl"]
    assert [s.path for s in made.data.sources("valid")] == ["/homes/me/v", "/homes/me/w/*", "./~", "a~"]
    root = Path("~root").expanduser()
    assert load(recipe, ["output=~root/x", "data.train={path: '~root/y'}"]).output == f"{root}/x"


def test_so_may_the_paths_of_the_command_line(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_command(monkeypatch, "inspect", "~/recipe.yaml", "output=~/here", "--html=~/row.html") == 0
    assert (tmp_path / "row.html").is_file()
    assert (tmp_path / "here").is_dir()


def test_a_file_that_is_called_as_the_home_folder(
    recipe: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    assert "for ~x.jsonl; a file of that name is ./~x.jsonl" in refused("data.train=~x.jsonl")
    shutil.copy(ROOT / "recipes/tiny/train.jsonl", tmp_path / "~")
    made = load(recipe, [f"data.train={tmp_path}/~"])
    assert made.data.train == f"{tmp_path}/~"
    monkeypatch.chdir(tmp_path)
    (source,) = load(recipe, ["data.train=./~"]).data.sources("train")
    assert Path(source.path).is_file()


PATHS = ["", "~nobody-of-that-name/x", "a\0b", "a" * 5000, "a/" * 2500]


@pytest.mark.parametrize("value", PATHS, ids=["empty", "home", "nul", "long", "deep"])
@pytest.mark.parametrize("field", ["model", "output", "data.train", "data.chat_template", "lora.adapter"])
def test_a_path_that_no_file_has(refused: Refused, field: str, value: str):
    said = refused(
        f"{field}='{value}'" if "\0" not in value and value.isprintable() else f'{field}="{ascii(value)[1:-1]}"'
    )
    assert said.startswith(f"{field}=")
    assert "\n" not in said
    assert "cannot be used as a path: " in said or "must" in said or "no home folder is known for ~nobody" in said


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("output", "{tmp}/recipe.yaml", "recipe.yaml is a file: name a folder"),
        ("output", "{tmp}/recipe.yaml/x", "recipe.yaml is a file: name a folder"),
        ("model", "{tmp}/recipe.yaml", "no such folder"),
        ("model", "a/b c", "a/b c: no such folder"),
        ("model", "a/../b", "a/../b: no such folder"),
        ("model", "ä/ö", "ä/ö: no such folder"),
        ("data.train", "a/b c", "no such file or folder as a/b c, which is no id of a data set either"),
        ("data.train", "ä/ö", "no such file or folder as ä/ö, which is no id of a data set either"),
        ("data.train", "a/../b", "No such file or directory"),
        ("data.train", "{tmp}", "no data set in"),
        (
            "data.chat_template",
            "{tmp}",
            "is no template's name (the tokenizer names none), and no file: Is a directory",
        ),
        ("data.chat_template", "{tmp}/none.jinja", "and no file: No such file or directory"),
    ],
)
def test_a_path_of_something_else(recipe: Path, refused: Refused, field: str, value: str, message: str, tmp_path: Path):
    said = refused(f"{field}={value.format(tmp=tmp_path)}")
    assert message in said
    assert "\n" not in said


def test_an_adapter_that_is_none(recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    for path, message in ((recipe, "Not a directory"), (recipe.parent, "No such file")):
        assert run_command(monkeypatch, "train", recipe, f"lora.adapter={path}") == 2
        assert f"{path}/adapter_config.json: " in (said := capfd.readouterr().err)
        assert message in said


def test_a_folder_without_permission():
    """As somebody without rights, in a process of its own: the tests may be run by root, who may do all."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    if (child := os.fork()) == 0:
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            rules.check_output(Recipe("m", DataSettings("x"), str(folder / "out")))
        except FieldError as error:
            os._exit(7 if str(error) == f"output: there is no permission to write in {folder}" else 1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    folder.rmdir()
    assert os.waitstatus_to_exitcode(status) == 7


@pytest.mark.parametrize("output", ["/", "/tmp/.."])
def test_the_root_folder_is_no_runs(output: str) -> None:
    with pytest.raises(FieldError, match="is the root folder"):
        rules.check_output(Recipe("m", DataSettings("x"), output))
