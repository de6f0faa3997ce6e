"""`from-llamafactory`: a LLaMA-Factory SFT config as the recipe that does the same, and what of it has no counterpart.

`config` reads the file, `conversion` collects what becomes of its fields; `model`, `data`, `objective`, `layout`,
`training` and `saving` each carry over the fields of one concern, `other` names those without counterpart; `report`
writes the recipe and the table.
"""

from bft_megatron.llamafactory.conversion import Conversion
from bft_megatron.llamafactory.convert import convert
from bft_megatron.llamafactory.report import print_table, recipe_text

__all__ = ["Conversion", "convert", "print_table", "recipe_text"]
