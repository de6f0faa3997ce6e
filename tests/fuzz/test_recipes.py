"""Any recipe is accepted or refused with a field, before torch is asked of anything; FUZZ_SECONDS makes it more."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bft_megatron.commands import request
from bft_megatron.errors import UserError, shortened
from bft_megatron.recipe import flags, reader
from bft_megatron.recipe.schema import Recipe
from bft_megatron.recipe.sources import SourceSettings
from tests.helpers.commands import ROOT

TINY = ROOT / "recipes" / "tiny"
EXAMPLES = int(float(os.environ.get("FUZZ_SECONDS", "10")) * 50)
"""About fifty a second."""

LONG = "a" * 5000
texts = st.text(max_size=5) | st.sampled_from(
    [
        "${oc.env:NOPE}",
        "${train.lr}",
        "${output}",
        "${",
        "${data}",
        "${nope}",
        "$",
        "${oc.env:HOME}",
        "\\${x}",
        "",
        "~",
        "~/x",
        "a/b c",
        "a/../b",
        "ä/ö",
        "a/b",
        "\0",
        "a\0b",
        LONG,
        f"{'a/' * 2500}",
        "/dev/null",
        "/dev/null/x",
        "/root",
        "/",
        "nan",
        "-inf",
        "1e400",
        "9" * 5000,
        "1e",
        "0x10",
        "yes",
        "???",
        "\ud800",
        "bft",
        "a:b",
        ":",
        ":1",
        "0E0",
    ]
)
numbers = (
    st.integers(-3, 40)
    | st.floats()
    | st.sampled_from([2**31 - 1, 2**31, 2**63, 10**12, 10**99, 10**400, -(10**30), 1e-320, 1e30, 1e308, 1, 0.5])
)
scalars = st.none() | st.booleans() | numbers | texts
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2), max_leaves=4
)

GOOD = {
    "model": st.just(str(TINY)),
    "output": st.just("out"),
    "adapter": st.none(),
    "chat_template": st.none(),
    "ObjectiveSettings.name": st.sampled_from(["sft", "bft", "dft"]),
    "dropout": st.just(0.0),
    "target": st.sampled_from(["all", "attention", ["q_proj"]]),
    "seq_length": st.just(128),
    "sequence": st.none(),
    "turns": st.just("joined"),
    "virtual_pipeline": st.just(1),
    "iterations": st.integers(0, 5),
    "epochs": st.none(),
    "micro_batch_size": st.just(1),
    "global_batch_size": st.sampled_from([8, 16]),
    "min_lr": st.just(0.0),
    "warmup_iterations": st.just(0),
    "keep_best": st.just(0),
    "path": st.just(str(TINY / "train.jsonl")),
    "SourceSettings.name": st.sampled_from("abcdefg") | st.none(),
    "rows": st.just(":100"),
    "format": st.just("auto"),
    "megatron": st.dictionaries(st.sampled_from(["log-throughput", "num-workers", "fp8_margin"]), numbers, max_size=1),
}
"""Field -> values that fit the tiny model, where any of its type would not."""


def mostly(right: st.SearchStrategy[Any], wrong: st.SearchStrategy[Any] = trees) -> st.SearchStrategy[Any]:
    return st.integers(0, 49).flatmap(lambda n: wrong if n == 49 else right)


def of_type(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, small ones, or None where it may be left out."""
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if options := [option for option in get_args(kind) if option is not type(None)]:
        return st.just({}) if get_origin(kind) is dict else st.none() | of_type(options[0])
    known = {bool: st.booleans(), int: st.integers(1, 2), float: st.floats(0.01, 0.9), str: st.just("x")}
    return known.get(kind, trees)


def groups(settings: type, needed: tuple[str, ...] = ()) -> st.SearchStrategy[dict[str, Any]]:
    """Groups of fields with any of a dataclass's, each mostly right, and with an unknown one at times."""
    kinds = get_type_hints(settings)
    found = {f.name: mostly(values(settings, f.name, kinds[f.name])) for f in fields(settings)}
    optional = {name: value for name, value in found.items() if name not in needed}
    known = st.fixed_dictionaries({name: found[name] for name in needed}, optional=optional)
    return st.tuples(known, mostly(st.just({}), st.dictionaries(texts, scalars, max_size=1))).map(
        lambda p: {**p[1], **p[0]}
    )


def values(settings: type, name: str, kind: Any) -> st.SearchStrategy[Any]:
    """Right values of a dataclass's field."""
    if name in ("train", "valid") and kind is Any:
        source = groups(SourceSettings, ("path",))
        return st.just(str(TINY / "train.jsonl")) | source | st.lists(source, min_size=1, max_size=2)
    if group := next((k for k in (kind, *get_args(kind)) if is_dataclass(k)), None):
        return groups(
            group, {"data": ("train", "seq_length"), "train": ("iterations", "global_batch_size")}.get(name, ())
        )
    return GOOD.get(f"{settings.__name__}.{name}", GOOD.get(name, of_type(kind)))


recipes = groups(Recipe, ("model", "data", "output", "train"))
"""Trees of the whole schema."""


def names() -> list[str]:
    """The dotted name of every field."""
    kinds = get_type_hints(Recipe)
    found = []
    for name, kind in kinds.items():
        group = next((k for k in (kind, *get_args(kind)) if is_dataclass(k)), None)
        found += [f"{name}.{f.name}" for f in fields(group)] if group else [name]
    return found


keys = st.sampled_from([*names(), "megatron.x", "train", "lora", "data.train[0]", "data.train.path"]) | st.text(
    max_size=4
)
overrides = st.builds("{}={}".format, keys, scalars | st.text("[]{}:,.$&*!|>'\"%@`#- \n\t0aé", max_size=9)) | texts
odd = [
    b"\xff\xfem\x00", "é: 1".encode("latin-1"), b"\x00", b"null: 1", b"0E0: 1", b"? [a]\n: 1", b"a: !!set {b}",
    b"a: !!python/name:os",
    b"megatron: " + b"[" * 900, b"megatron: &a [*a]", b"a: &a {b: *a}", b"train: {<<: 1}", b"- 1", b"",
    b"a: !!binary x",
    b"train: {seed: " + b"9" * 5000 + b"}", b"train: {lr: !!float x}", b"<<: {model: 3}", b"---\na: 1\n---\nb: 2",
    b"a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
    b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nmegatron: {x: [*e,*e,*e,*e,*e,*e,*e,*e]}",
]  # fmt: skip
files = (
    st.binary(max_size=40)
    | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.sampled_from(odd)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(autouse=True)
def _elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a recipe names as its output is in a folder of the tests."""
    monkeypatch.chdir(folder)


def outcome(file: Path, changes: list[str]) -> str:
    """What the command line does before it imports torch: "" if the recipe is accepted, else the refusal."""
    try:
        made = request.read(file, changes)
        made.world()
    except UserError as error:
        said = str(error)
        places = [str(file), *(shortened(change, 20).removesuffix(" ...") for change in changes)]
        named = any(place in said for place in places)
        assert named, said
        assert len(said) < 3000
        assert "\n" not in said or all(str(file) in line or "=" in line for line in said.splitlines())
        return said
    assert all(flags.refusal(flag, value) is None for flag, value in made.recipe.megatron.items())
    return ""


def budget(share: float) -> Any:
    """Hypothesis's settings for a share of the examples."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(
        max_examples=max(10, int(EXAMPLES * share)), deadline=None, suppress_health_check=slow, database=None
    )


accepted = []


@budget(0.6)
@given(recipe=recipes, changes=mostly(st.just([]), st.lists(overrides, max_size=2)))
def test_recipes_of_the_schema(folder: Path, recipe: dict[str, Any], changes: list[str]):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    accepted.append(outcome(file, changes) == "")


def test_many_of_them_are_accepted():
    assert sum(accepted) > len(accepted) / 10, (sum(accepted), len(accepted))


@budget(0.05)
@given(recipe=recipes)
def test_what_a_run_writes_down_reads_the_same(folder: Path, recipe: dict[str, Any]):
    file, written = folder / "recipe.yaml", folder / "config.yaml"
    file.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    try:
        made = reader.load(file)
    except UserError:
        return
    written.write_text(reader.dump(made), encoding="utf-8")
    assert reader.load(written) == made


@budget(0.3)
@given(changes=st.lists(overrides, min_size=1, max_size=3))
def test_overrides(folder: Path, changes: list[str]):
    file = folder / "recipe.yaml"
    file.write_text(
        f"model: {TINY}\noutput: out\ndata: {{train: {TINY}/train.jsonl, seq_length: 128}}\ntrain: {{epochs: 1}}\n"
    )
    outcome(file, changes)


@budget(0.1)
@given(content=files)
def test_files_of_anything(folder: Path, content: bytes):
    file = folder / "recipe.yaml"
    file.write_bytes(content)
    assert outcome(file, []) != ""
