"""Whose names and grids a checkpoint has, and how its weights come in."""
