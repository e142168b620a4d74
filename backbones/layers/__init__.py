"""Layers shared by several backbone families."""
