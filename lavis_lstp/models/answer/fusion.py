"""Frames of one sample -> visual prefix of the language model (SPEC of the published system: concat and mean).

In: `frame_tokens` [B,K,Q,D] of the Q-Former and a mask of real frames. Out: `visual_prefix` [B,P,D_llm] and its
mask. It owns no weights: the projection belongs to the backbone, whose checkpoints contain it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lavis_lstp.errors import ConfigError, unknown_name

FUSIONS = ("concat", "mean")


class FrameFusion:
    """Joins and projects the query tokens of a sample's frames.

    Args:
        name: "concat" projects every token, frame-major: P = K*Q tokens. "mean" averages each query token over
            the sample's real frames, then projects: P = Q tokens.

    Raises:
        ConfigError: for another name.
    """

    def __init__(self, name: str):
        if name not in FUSIONS:
            raise ConfigError(unknown_name("fusion", name, FUSIONS))
        self.name = name

    def __call__(
        self, frame_tokens: Tensor, frame_mask: Tensor, project: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            frame_tokens: [B,K,Q,D].
            frame_mask: [B,K], 1 = real frame. A row without any (text only) gets mask 0 throughout.
            project: Linear D -> D_llm.

        Returns:
            visual_prefix [B,P,D_llm] and prefix_mask [B,P] (int64).
        """
        batch, frames, queries, width = frame_tokens.shape
        if self.name == "concat":
            prefix = project(frame_tokens.reshape(batch, frames * queries, width))
            return prefix, frame_mask.long().repeat_interleave(queries, dim=1)
        weight = frame_mask.to(frame_tokens.dtype)[:, :, None, None]
        # where, not multiplication: what stands in padded frames must not reach the mean, be it inf or NaN
        total = torch.where(weight > 0, frame_tokens, 0).sum(dim=1)
        mean = total / weight.sum(dim=1).clamp(min=1)
        has_frames = (frame_mask.sum(dim=1, keepdim=True) > 0).long()
        return project(mean), has_frames.expand(batch, queries)
