"""`python -m lavis_lstp` is `lavis-lstp`."""

from lavis_lstp.commands.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
