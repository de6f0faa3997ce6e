"""A YAML file of fields, with the line of each field."""

from __future__ import annotations

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from bft_megatron.errors import UserError


class YamlFile:
    """A YAML file of fields: their values in `tree`, their line numbers in `lines`.

    Raises:
        UserError: the file is not YAML, with the line, or not a mapping.
    """

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.lines: dict[str, int] = {}
        try:
            node = yaml.compose(text)
            tree = OmegaConf.create(text)
        except yaml.YAMLError as e:
            mark = getattr(e, "problem_mark", None)
            raise UserError(
                f"not YAML: {getattr(e, 'problem', e)}", f"{path}:{mark.line + 1}" if mark else str(path)
            ) from None
        if not isinstance(node, yaml.MappingNode) or not isinstance(tree, DictConfig):
            raise UserError("must be a mapping of fields, such as those in recipes/", str(path))
        self.tree = tree
        self._note_lines(node, "")

    def _note_lines(self, node: yaml.MappingNode, prefix: str) -> None:
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            self.lines[name] = key.start_mark.line + 1
            if isinstance(value, yaml.MappingNode):
                self._note_lines(value, f"{name}.")

    def where(self, key: str) -> str:
        """Return `file:line: key`, without the parts that are not known."""
        line = self.lines.get(key)
        place = f"{self.path}:{line}" if line else str(self.path)
        return f"{place}: {key}" if key else place
