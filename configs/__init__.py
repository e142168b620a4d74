"""Recipes as data: `<task>/<family>/<variant>_<data>.yaml`."""
