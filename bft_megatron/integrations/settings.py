"""An objective's settings from keyword arguments, checked as a recipe's are."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bft_megatron.errors import FieldError
from bft_megatron.recipe import limits, yaml_file
from bft_megatron.recipe.schema import ObjectiveSettings


def objective_settings(name: str, values: dict[str, Any]) -> ObjectiveSettings:
    """Return the settings of an objective from fields of a recipe's `objective:`, checked as those of a recipe.

    Raises:
        FieldError: there is no such field, or a value is not one of the field's.
    """
    try:
        given = OmegaConf.create({"name": name} | values)
        merged = OmegaConf.merge(OmegaConf.structured(ObjectiveSettings), given)
    except OmegaConfBaseException as e:
        raise FieldError(f"objective.{getattr(e, 'full_key', None) or 'name'}", yaml_file.said(e)) from None
    settings = OmegaConf.to_object(merged)
    assert isinstance(settings, ObjectiveSettings)
    limits.check(settings, "objective.")
    return settings
