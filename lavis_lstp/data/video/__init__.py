"""Frames, times and motion of video files, and of folders of pictures."""

from lavis_lstp.data.video.reading import probe, read_frames

__all__ = ["probe", "read_frames"]
