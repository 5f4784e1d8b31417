"""Tasks; importing this package registers them with LAVIS."""

from lavis_lstp.tasks.base import LSTPTask
from lavis_lstp.tasks.pseudo_span import PseudoSpanTask
from lavis_lstp.tasks.temporal_grounding import TemporalGroundingTask
from lavis_lstp.tasks.video_qa import VideoInstructTask, VideoQATask

__all__ = ["LSTPTask", "PseudoSpanTask", "TemporalGroundingTask", "VideoInstructTask", "VideoQATask"]
