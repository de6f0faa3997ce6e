"""Reader of recipes: YAML with key=value overrides becomes the dataclasses of `schema`, and is written back in full.

Imports no torch, so that a faulty recipe is refused before anything slow or expensive starts.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import Container, DictConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bft_megatron.errors import FieldError, UserError, reading, shortened
from bft_megatron.recipe import flags, limits, sources
from bft_megatron.recipe.schema import ObjectiveSettings, Recipe
from bft_megatron.recipe.yaml_file import YamlFile, composed, said
from bft_megatron.textfiles import read_text

MAY_BE_NULL = {"lora"}
"""Groups of fields that may be null."""

MOST_REPORTED = 20
"""Unknown fields that one message lists."""

REFUSED_FIELDS = {
    "objective.label_smoothing": "with label smoothing exp(-loss) is no longer the model's probability of the label, "
    "of which the weights of bft and dft are made; leave it out",
}
"""Field of other trainers that would be wrong here -> reason for refusing it."""


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe's YAML, apply `key=value` overrides and fill in the defaults.

    `${oc.env:NAME}` in a value is the environment variable NAME, and `${group.field}` another field's value. A path
    that begins with `~` is in the home folder.

    Raises:
        UserError: the file cannot be read, a key is unknown, or a value has the wrong type or is outside its field's
            limits; the message names file, line and field.
    """
    ObjectiveSettings()  # reads the environment first, so that a bad variable is reported by its own name
    layers = _layers(Path(path), overrides or [])
    _refuse_unknown([(key, layer.where(key)) for layer in layers for key in layer.keys])
    merged = OmegaConf.structured(Recipe)
    for layer in layers:
        merged = layer.merged_into(merged)
    for key, place in {key: layer.where(key) for layer in layers for key in layer.keys}.items():
        _check_resolves(merged, key, place)
    with reading(str(path)):
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"{', '.join(missing)} must be given", str(path))
        recipe = OmegaConf.to_object(merged)
    assert isinstance(recipe, Recipe), "merged into a structured Recipe"
    recipe = limits.at_home(recipe)
    data = replace(recipe.data, train=sources.at_home(recipe.data.train), valid=sources.at_home(recipe.data.valid))
    recipe = replace(recipe, data=data)
    try:
        limits.check(recipe)
    except FieldError as e:
        raise UserError(e.message, _where(layers, e.field)) from None
    return recipe


def where(path: str | Path, overrides: list[str], field_name: str) -> str:
    """Return where a field got its value: the last override that sets it, else its line in the recipe's file."""
    return _where(_layers(Path(path), overrides), field_name)


def dump(recipe: Recipe) -> str:
    """Return the recipe with every default as YAML, from which `load` reads the same recipe."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


@dataclass(frozen=True)
class _Layer:
    """The fields that the file, or an override, sets.

    Attributes:
        tree: the values; flags under `megatron` have their canonical names.
        source: the recipe's file.
        override: the text of the override; None for the file.
    """

    tree: DictConfig
    source: YamlFile
    override: str | None = None

    @cached_property
    def keys(self) -> list[str]:
        """The dotted names of the fields, without groups that may be null and are."""
        return [key for key in _leaf_keys(self.tree) if key not in MAY_BE_NULL or not self._is_null(key)]

    def _is_null(self, key: str) -> bool:
        node = self.tree._get_node(key)
        return isinstance(node, Node) and node._is_none()

    def where(self, key: str) -> str:
        """Return the override, or the file with the field's line."""
        if self.override is not None:
            return shortened(self.override, 200)
        written = next((name for name in self.source.lines if flags.canonical_field(name) == key), key)
        return self.source.where(written)

    def sets(self, field_name: str) -> bool:
        """Return whether the layer gives a field, a part of it, or a flag under `megatron` its value."""
        group, _, flag = field_name.partition(".")
        given = self.tree._get_node("megatron") if group == "megatron" else None
        itself_or_part = any(f"{key}.".startswith(f"{field_name}.") for key in self.keys)
        return itself_or_part or (isinstance(given, DictConfig) and flag in given)

    def merged_into(self, merged: DictConfig) -> DictConfig:
        """Return the recipe so far with the layer's values. Raises UserError for a value of the wrong type."""
        with reading(self.where("")):
            try:
                made = OmegaConf.merge(merged, self.tree)
            except OmegaConfBaseException as e:
                raise UserError(said(e), self.where(e.full_key or "")) from None
        assert isinstance(made, DictConfig), "both are mappings"
        return made


def _layers(path: Path, overrides: list[str]) -> list[_Layer]:
    source = YamlFile(path, read_text(path))
    layers = [_Layer(source.tree, source), *(_Layer(_override(text), source, text) for text in overrides)]
    for layer in layers:
        with reading(layer.where("megatron")):
            _name_flags(layer)
    return layers


def _where(layers: list[_Layer], field_name: str) -> str:
    setting = next((layer for layer in reversed(layers) if layer.sets(field_name)), layers[0])
    return setting.where(field_name)


def _check_resolves(merged: DictConfig, key: str, place: str) -> None:
    """Raise UserError if a value has a `${...}` that stands for nothing, for itself, or for text with another."""
    with reading(place):
        try:
            value = OmegaConf.select(merged, key)
            if isinstance(value, Container):
                value = OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException as e:
            raise UserError(said(e), place) from None
    if "${" in str(value):  # a later start would read it from config.yaml as a name
        raise UserError("must not hold `${`, which names an environment variable or a field", place)


def _override(text: str) -> DictConfig:
    key, equals, value = text.partition("=")
    place = shortened(text, 200)
    if not equals or not key.strip():
        raise UserError("an override is written key=value, for example train.lr=1e-5", place)
    with reading(place):
        try:
            composed(value, lambda *_: place)
            return OmegaConf.from_dotlist([text])
        except (yaml.YAMLError, OmegaConfBaseException) as e:
            what = getattr(e, "problem", None) or str(e).partition("\n")[0]
            raise UserError(f"cannot read the value: {shortened(what, 200)}", place) from None


def _name_flags(layer: _Layer) -> None:
    """Rename the flags under `megatron` to their canonical names, so that no other code handles other spellings.

    Raises:
        UserError: `megatron` holds no flags by name, or the same flag under two names.
    """
    given = layer.tree._get_node("megatron")
    if given is None:
        return
    if not isinstance(given, DictConfig) or given._is_none() or given._is_interpolation():
        raise UserError("must be flags by name, such as {recompute-granularity: selective}", layer.where("megatron"))
    named: dict[str, Any] = {}
    for name in given:
        flag = flags.canonical(str(name))
        if flag in named:
            where = layer.override or layer.source.where(f"megatron.{name!s}")
            raise UserError(f"is Megatron's flag {flag}, which is given already", where)
        named[flag] = given._get_node(name)
    OmegaConf.update(layer.tree, "megatron", named, merge=False)


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


def _refuse_unknown(given: list[tuple[str, str]]) -> None:
    """Raise UserError for the fields that a recipe does not have, one line for each.

    Args:
        given: (dotted name, place) of every field.
    """
    if wrong := [f"{place}: {fault}" for key, place in given if (fault := _unknown(key))]:
        raise UserError("\n".join(wrong[:MOST_REPORTED]))


_types = cache(get_type_hints)


def _unknown(key: str) -> str | None:
    """Return why a recipe does not have a field, and which one may be meant; None if it has it."""
    if key in REFUSED_FIELDS:
        return REFUSED_FIELDS[key]
    schema: Any = Recipe
    for i, name in enumerate(parts := key.split(".")):
        known = {f.name for f in fields(schema)}
        if name not in known:
            if close := difflib.get_close_matches(name, known, n=1):
                return f"unknown field; did you mean `{'.'.join([*parts[:i], *close])}`?"
            return f"unknown field; known here: {', '.join(sorted(known))}"
        declared = _types(schema)[name]
        schema = next((t for t in get_args(declared) if is_dataclass(t)), declared)  # `Group | None` is a group
        if not is_dataclass(schema):
            if schema is not Any and get_origin(schema) is not dict and i + 1 < len(parts):
                return f"`{'.'.join(parts[: i + 1])}` takes a value, not fields"
            if key == "data.chat_template_kwargs":  # a leaf only if it is no mapping
                return "must be variables by name, such as {enable_thinking: false}"
            return None
    return f"`{shortened(key)}` is a group of fields; known here: {', '.join(f.name for f in fields(schema))}"
