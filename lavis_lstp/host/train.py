"""`python -m lavis.train --cfg-path FILE [--options a.b=c ...]`: train what a YAML file describes.

The import hook serves this file under LAVIS's name; the PyPI wheel of LAVIS has no such module.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    from lavis_lstp.host import launch

    return launch.main(argv)


if __name__ == "__main__":
    from lavis_lstp.host.launch import leave

    leave(main())
