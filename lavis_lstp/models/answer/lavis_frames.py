"""Several frames of a video through the `generate` of a LAVIS model that knows one picture.

In: one of LAVIS's BLIP-2 models. Out: the same, whose `image` may be [B,K,3,H,W] while the context lasts. Each frame
goes through vision tower and Q-Former, and the language model reads the K frames' tokens one after the other, as
LAVIS's own InstructBLIP does it with video. LAVIS's code runs unchanged between two hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lavis_lstp.errors import ConfigError

PROJECTIONS = ("t5_proj", "opt_proj")


@contextmanager
def several_frames(model: nn.Module, images: object) -> Iterator[None]:
    """While it lasts, the model takes pictures of the shape of `images`: [B,K,3,H,W]; for another nothing changes.

    Raises:
        ConfigError: the model has not the parts of BLIP-2.
    """
    if not isinstance(images, Tensor) or images.ndim != 5:
        yield
        return
    projection = next((getattr(model, name) for name in PROJECTIONS if hasattr(model, name)), None)
    if projection is None or not hasattr(model, "visual_encoder"):
        raise ConfigError(
            f"datasets.<name>.image_frames shows several frames to LAVIS's blip2_t5 and blip2_opt, and this is "
            f"{type(model).__name__}; set it to 1"
        )
    frames = images.shape[1]
    hooks = [
        model.visual_encoder.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1), *args[1:])),
        projection.register_forward_hook(lambda _, args, out: out.unflatten(0, (-1, frames)).flatten(1, 2)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
