"""What all pages of this package have in common: one file, no network, light and dark, narrow and wide.

In: a title, the body, perhaps a script. Out: HTML. The content security policy in it lets a browser load nothing and
run no script but the page's own, whatever a question or a file name holds.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

FOLDER = Path(__file__).resolve().parent


def page_of(title: str, body: str, *, script: str = "") -> str:
    """A page.

    Args:
        title: text.
        body, script: HTML and JavaScript, escaped by whoever made them.
    """
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    allowed = f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" if script else "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"{f'<script>{script}</script>' if script else ''}\n</body>\n</html>\n"
    )


def picture_tag(picture: Image.Image | Figure, alt: str) -> str:
    """An `img` that holds its picture, from PIL or matplotlib.

    Args:
        alt: what it shows, for those who do not see it.
    """
    return f'<img alt="{html.escape(alt)}" src="{data_uri(picture_bytes(picture), "image/png")}">'


def picture_bytes(picture: Image.Image | Figure) -> bytes:
    """PNG of a picture from PIL or matplotlib."""
    raw = io.BytesIO()
    if hasattr(picture, "savefig"):
        picture.savefig(raw, format="png", dpi=150)
    else:
        picture.save(raw, "PNG")
    return raw.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
