"""Sphinx's settings for the site of these pages: `make docs` builds it and fails at a link that leads nowhere."""

project = "bft-megatron"
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "bft-megatron"
