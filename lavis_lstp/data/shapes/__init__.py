"""Shapes-QA: videos that are generated from a seed, with questions that need one particular moment."""
