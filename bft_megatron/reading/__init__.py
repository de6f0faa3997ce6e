"""Reading the files of a source: their rows, as conversations."""
