"""Reader of recipes: YAML with key=value overrides becomes the dataclasses of `schema`, and is written back in full.

Imports no torch, so that a faulty recipe is refused before anything slow or expensive starts.
"""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bft_megatron.errors import UserError
from bft_megatron.recipe import flags
from bft_megatron.recipe.schema import ObjectiveSettings, Recipe
from bft_megatron.recipe.yaml_file import YamlFile

MAY_BE_NULL = {"lora"}
"""Groups of fields that may be null."""

REFUSED_FIELDS = {
    "objective.label_smoothing": "with label smoothing exp(-loss) is no longer the model's probability of the label, "
    "of which the weights of bft and dft are made; leave it out",
}
"""Field of other trainers that would be wrong here -> reason for refusing it."""


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe's YAML, apply `key=value` overrides and fill in the defaults.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, or a value has the wrong type; the message names
            file, line and field.
    """
    path = Path(path)
    ObjectiveSettings()  # reads the environment first, so that a bad variable is reported by its own name
    try:
        text = path.read_text()
    except OSError as e:
        raise UserError(f"cannot read the recipe: {e.strerror}", str(path)) from None
    source = YamlFile(path, text)
    layers = [(source.tree, None), *((_override(o), o) for o in overrides or [])]
    merged = OmegaConf.structured(Recipe)
    for tree, override in layers:
        _name_flags(tree, override, source)
        for key in _leaf_keys(tree):
            if key in MAY_BE_NULL and OmegaConf.select(tree, key) is None:
                continue
            _refuse_unknown(key, override or source.where(key))
        try:
            merged = OmegaConf.merge(merged, tree)
        except OmegaConfBaseException as e:
            key = e.full_key or ""
            raise UserError(e.msg.splitlines()[0] if e.msg else str(e), override or source.where(key)) from None
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise UserError(f"{', '.join(missing)} must be given", str(path))
    recipe = OmegaConf.to_object(merged)
    assert isinstance(recipe, Recipe), "merged into a structured Recipe"
    return recipe


def where(path: str | Path, overrides: list[str], field_name: str) -> str:
    """Return where a field got its value: the last override that names it, else its line in the recipe's file."""
    for override in reversed(overrides):
        if flags.canonical_field(override.partition("=")[0]) == field_name:
            return override
    source = YamlFile(Path(path), Path(path).read_text())
    return source.where(next((key for key in source.lines if flags.canonical_field(key) == field_name), field_name))


def dump(recipe: Recipe) -> str:
    """Return the recipe with every default as YAML, from which `load` reads the same recipe."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _override(text: str) -> DictConfig:
    key, equals, _ = text.partition("=")
    if not equals or not key.strip():
        raise UserError("an override is written key=value, for example train.lr=1e-5", text)
    try:
        return OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as e:
        raise UserError(f"cannot read the value: {str(e).splitlines()[0]}", text) from None


def _name_flags(tree: DictConfig, override: str | None, source: YamlFile) -> None:
    """Rename the flags under `megatron` to their canonical names, so that no other code handles other spellings.

    Args:
        tree: the fields of the file or of an override.
        override: the text of the override; None for the file.

    Raises:
        UserError: the same flag is given under two names.
    """
    given = OmegaConf.select(tree, "megatron")
    if not isinstance(given, DictConfig) or given._is_none():
        return
    named: dict[str, Any] = {}
    for name in given:
        flag = flags.canonical(str(name))
        if flag in named:
            where = override or source.where(f"megatron.{name!s}")
            raise UserError(f"is Megatron's flag {flag}, which is given already", where)
        named[flag] = given._get_node(name)
    OmegaConf.update(tree, "megatron", named, merge=False)


def _leaf_keys(tree: DictConfig, prefix: str = "") -> list[str]:
    """Return the dotted keys of a tree's leaves. `megatron` counts as a leaf, because its keys are Megatron's."""
    keys = []
    for key in tree:
        name, value = str(key), tree._get_node(key)
        if isinstance(value, DictConfig) and f"{prefix}{name}" != "megatron" and not value._is_none():
            keys += _leaf_keys(value, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _refuse_unknown(key: str, where: str) -> None:
    if key in REFUSED_FIELDS:
        raise UserError(REFUSED_FIELDS[key], where)
    schema: Any = Recipe
    for i, name in enumerate(parts := key.split(".")):
        known = {f.name for f in fields(schema)}
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"; did you mean `{'.'.join([*parts[:i], *close])}`?"
                if close
                else f"; known here: {', '.join(sorted(known))}"
            )
            raise UserError(f"unknown field{hint}", where)
        declared = get_type_hints(schema)[name]
        schema = next((t for t in get_args(declared) if is_dataclass(t)), declared)  # `Group | None` is a group
        if not is_dataclass(schema):
            if schema is not dict and i + 1 < len(parts) and name != "megatron":
                raise UserError(f"`{'.'.join(parts[: i + 1])}` takes a value, not fields", where)
            return
    raise UserError(f"`{key}` is a group of fields; known here: {', '.join(f.name for f in fields(schema))}", where)
