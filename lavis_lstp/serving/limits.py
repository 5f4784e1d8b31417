"""The bounds of a server in one record; options of `lavis-lstp serve` set them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one server; whatever is beyond them is refused in one line.

    Attributes:
        most_waiting: questions that wait or are answered at a time; further ones get 429.
        most_in_batch: questions of one batch of the model.
        decoders: videos that are decoded at a time.
        inline_bytes: of one request, `data:` URLs included.
        upload_bytes: of one uploaded or fetched file.
        max_seconds: of a video.
        max_megapixels: of a picture or of a video's frames.
        most_files: uploads that one client may have.
        keep_hours: uploads are deleted after so long.
        most_parts: pictures of one message, and messages of one request.
        most_characters: of all texts of a request.
        fetch_seconds: for fetching an address.
    """

    most_waiting: int = 64
    most_in_batch: int = 8
    decoders: int = 8
    inline_bytes: int = 64 << 20
    upload_bytes: int = 512 << 20
    max_seconds: float = 3 * 3600
    max_megapixels: float = 16
    most_files: int = 100
    keep_hours: float = 24
    most_parts: int = 128
    most_characters: int = 100_000
    fetch_seconds: float = 30
