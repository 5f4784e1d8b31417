"""Packages that LAVIS imports at its top and seldom uses, put off until first use."""


def install() -> None:
    """Nothing is put off yet."""
