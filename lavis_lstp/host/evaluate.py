"""`python -m lavis.evaluate --cfg-path FILE [--options a.b=c ...]`: evaluate without training.

The same as `lavis.train` with `run.evaluate=True`; the import hook serves this file under LAVIS's name.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    from lavis_lstp.host import launch

    return launch.main(argv, evaluate_only=True)


if __name__ == "__main__":
    from lavis_lstp.host.launch import leave

    leave(main())
