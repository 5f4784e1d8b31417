"""Tar shards with an index: their form, where they are stored, and the questions in them."""


def __getattr__(name):
    """`ShardQuestions`, imported when asked for: most that is here needs no torch."""
    if name != "ShardQuestions":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lavis_lstp.data.shards.questions import ShardQuestions

    return ShardQuestions
