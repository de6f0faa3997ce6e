"""`from-llamafactory`: converts a LLaMA-Factory SFT config to an equivalent recipe and lists what has no counterpart.

`config` reads the file, `conversion` collects the recipe's fields; `model`, `template`, `data`, `objective`,
`parallelism`, `training` and `saving` each convert the fields of one concern, and `other` lists those without
counterpart. `arguments` has them all, with their defaults, from the tables `carried`, `named` and `unneeded`.
`rendering` writes the recipe and the table.

"""

from bft_megatron.llamafactory.conversion import Conversion
from bft_megatron.llamafactory.convert import convert
from bft_megatron.llamafactory.rendering import print_table, recipe_text

__all__ = ["Conversion", "convert", "print_table", "recipe_text"]
