"""Weights: where they are looked for, how files are read, which part of a model a key belongs to."""
