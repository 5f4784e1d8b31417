"""Weights: where they are looked for, how files are read, which part of a model a key belongs to."""

from lavis_lstp.models.weights.hub import weights_file

__all__ = ["weights_file"]
