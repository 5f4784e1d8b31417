"""Tar shards with an index: their form, where they are stored, and the questions in them."""

from lavis_lstp.data.shards.questions import ShardQuestions

__all__ = ["ShardQuestions"]
