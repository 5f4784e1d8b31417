"""Optical flow between neighbouring frames of a clip: frames in, one field per frame out.

In: uint8 frames [B,T,3,H,W] and a mask of the real ones; for `motion_vectors` and `precomputed` also the flow
that the data set read. Out: float32 [B,T,2,h,w], (u, v) = how far the picture at a place moves until the next
frame, in px of the h x w grid, x right, y down. Pair t is frames (t, t+1), the last field is repeated so that
L = T (SPEC 5), a clip of one frame has zero flow, and padding has zero flow and never forms a pair.

`FlowExtractor` does what all kinds share (pairs, masks, size, normalising); an *estimator* only turns pairs of
frames into fields. Costs for a 224 x 224 pair on one core: RAFT large 2.5 s, small 0.69 s, DIS 4 to 8 ms, motion
vectors 1 to 2 ms.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lavis_lstp.data.store import Store, array_digest, entry_key
from lavis_lstp.errors import ConfigError, LstpError, WeightsError, unknown_name
from lavis_lstp.models.pixels import IMAGE_MEAN, IMAGE_STD
from lavis_lstp.models.weights.hub import UNINITIALISED, local_path, where_to_put
from lavis_lstp.models.weights.reading import convert_published, load_state_dict_file, load_strict

FLOW_NAMES = ("raft_large", "raft_small", "dis", "motion_vectors", "precomputed", "none")
FLOW_PRESETS = ("none", "published_training", "published_inference")
DIS_PRESETS = ("ultrafast", "fast", "medium")
GIVEN = ("motion_vectors", "precomputed")

RAFT_MIN_SIDE = 128  # px; its correlation pyramid halves 1/8 of this three times
DIS_MIN_SIDE = 16  # px; OpenCV fails below 12
RAFT_URLS = {
    "raft_large": "https://download.pytorch.org/models/raft_large_C_T_SKHT_V2-ff5fadd5.pth",
    "raft_small": "https://download.pytorch.org/models/raft_small_C_T_V2-01064c6d.pth",
}


def build_flow(
    name: str,
    *,
    weights: str | os.PathLike | None = None,
    flow_size: int | Sequence[int] | None = None,
    flow_preset: str = "none",
    iterations: int = 20,
    pairs_at_once: int = 8,
    dis_preset: str = "medium",
) -> FlowExtractor:
    """The flow extractor of a config.

    Args:
        name: raft_large, raft_small, dis, motion_vectors, precomputed or none.
        weights: RAFT only, like `iterations`. A .safetensors or .pth file, torchvision's or the published one; null =
            torchvision's file in torch's cache, if it lies there; 'checkpoint' = random now, a checkpoint brings them.
        flow_size: side, or (height, width), of the field handed out, its values scaled along; null = that of the
            frames, or of the given flow.
        flow_preset: published_training divides each clip by its largest displacement; published_inference feeds RAFT as
            the published demo does (CLIP-normalised, over 255) and divides by nothing (SPEC 0).
        iterations: RAFT's updates.
        pairs_at_once: RAFT's batch; at 224 x 224 one pair takes about 0.1 GB.
        dis_preset: ultrafast, fast or medium.

    Raises:
        ConfigError: a name that is not known.
        WeightsError: RAFT's weights are missing or do not fit. Nothing is downloaded.
    """
    if name not in FLOW_NAMES:
        raise ConfigError(unknown_name("flow", name, FLOW_NAMES))
    if flow_preset not in FLOW_PRESETS:
        raise ConfigError(unknown_name("flow_preset", flow_preset, FLOW_PRESETS))
    if name.startswith("raft"):
        published_input = flow_preset == "published_inference"
        model = RaftFlow(
            name,
            weights=weights,
            iterations=iterations,
            pairs_at_once=pairs_at_once,
            published_input=published_input,
        )
    elif name == "dis":
        model = DisFlow(dis_preset)
    else:
        model = None
    normalise = flow_preset == "published_training"
    return FlowExtractor(name, estimator=model, flow_size=flow_size, normalise=normalise)


class FlowExtractor(nn.Module):
    """Frames of a clip -> one field per frame; see the module's text.

    Where `store` is set, fields that RAFT or DIS computed are kept on disk there.

    RAFT's network is its attribute `model`, so that checkpoints name it `flow.model.`; it is frozen and in eval mode
    whatever `train()` says, because BatchNorm must not learn from validation frames.
    """

    def __init__(
        self,
        name: str,
        *,
        estimator: RaftFlow | DisFlow | None = None,
        flow_size: int | Sequence[int] | None = None,
        normalise: bool = False,
    ):
        super().__init__()
        self.name = name
        self.store: Store | None = None
        self.estimator = estimator
        self.model = estimator.net if isinstance(estimator, RaftFlow) else None
        self.normalise = normalise
        size = (flow_size, flow_size) if isinstance(flow_size, int) else flow_size
        self.flow_size = None if size is None else (int(size[0]), int(size[1]))
        if self.flow_size is not None and min(self.flow_size) < 1:
            raise ConfigError(f"expected a flow_size of at least 1, got {flow_size}")

    def train(self, mode: bool = True) -> FlowExtractor:
        super().train(mode)
        if self.model is not None:
            self.model.eval()
        return self

    @torch.no_grad()
    def forward(
        self,
        frames: Tensor,
        frame_mask: Tensor | None = None,
        flow: Tensor | None = None,
        flow_mask: Tensor | None = None,
    ) -> Tensor:
        """float32 [B,T,2,h,w] in px per frame; [B,L,2,h,w] where the flow given has a mask of its own.

        Args:
            frames: uint8 [B,T,3,H,W].
            frame_mask: [B,T], 1 = real frame; real frames come first. None = all.
            flow: what the data set brought, [B,T,2,h,w]; used by `motion_vectors` and `precomputed`, else ignored.
            flow_mask: [B,L], 1 = real, of a flow [B,L,2,h,w] that does not depend on the frames.

        Raises:
            LstpError: the extractor needs the batch's flow and there is none, or not for these frames.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[2] != 3:
            raise ValueError(f"expected uint8 frames [B,T,3,H,W], got {frames.dtype} {list(frames.shape)}")
        batch, length = frames.shape[:2]
        mask = torch.ones(batch, length, device=frames.device) if frame_mask is None else frame_mask
        mask = mask.to(frames.device).bool()
        if mask.shape != (batch, length):
            raise ValueError(f"expected frame_mask {[batch, length]}, got {list(mask.shape)}")
        if self.store is not None and self.estimator is not None:
            return self._kept(frames, mask)
        return self._computed(frames, mask, flow, flow_mask)

    def _keys(self, clips: Iterable[Tensor], device: torch.device, pairs: bool = False) -> list[str]:
        decides = {"by": self.name, "size": self.flow_size, "normalise": self.normalise, "pairs": pairs}
        decides |= {"device": device.type, **self.estimator.identity()}  # reads all weights, so once for a batch
        return [entry_key("flow", array_digest(clip.cpu().numpy()), decides) for clip in clips]

    def _kept(self, frames: Tensor, mask: Tensor) -> Tensor:
        """The fields of each clip from the store, by what the estimator sees of it; new ones are put there."""
        keys = self._keys((clip[real] for clip, real in zip(frames, mask, strict=True)), frames.device)
        found = {key: self.store.get(key) for key in keys}
        new = {key: row for row, key in enumerate(keys) if found[key] is None}
        if new:
            rows = list(new.values())
            for key, field, real in zip(new, self._computed(frames[rows], mask[rows]), mask[rows], strict=True):
                found[key] = {"flow": field[real].cpu().numpy()}
                if real.sum() > 1:  # a picture does not move
                    self.store.put(key, found[key])
        clips = [torch.from_numpy(found[key]["flow"]).to(frames.device) for key in keys]
        out = clips[0].new_zeros(*frames.shape[:2], *clips[0].shape[1:])
        for row, clip in enumerate(clips):
            out[row, : len(clip)] = clip
        return out

    def _computed(
        self,
        frames: Tensor,
        mask: Tensor,
        flow: Tensor | None = None,
        flow_mask: Tensor | None = None,
    ) -> Tensor:
        batch, length = frames.shape[:2]
        if self.name in GIVEN:
            field = self._given(frames, flow, flow_mask)
        elif self.name == "none":
            field = torch.zeros(batch, length, 2, *(self.flow_size or frames.shape[-2:]), device=frames.device)
        else:
            # As `lavis-lstp flow` computes it, in any run. TF32, cuDNN's default for convolutions, moves RAFT's fields
            # by up to 0.05 px, and differently with another number of pairs at once.
            with torch.autocast(frames.device.type, enabled=False), full_precision_convolutions():
                field = self._between(frames, mask)
        own = self.name in GIVEN and flow_mask is not None
        return self._finished(field * flow_mask.to(field)[:, :, None, None, None] if own else repeat_last(field, mask))

    @torch.no_grad()
    def of_pairs(self, pairs: Tensor) -> Tensor:
        """float32 [1,T,2,h,w]: the flow of one clip whose T pairs are given, as `flow_pairs: local` reads them.

        Args:
            pairs: uint8 [T,2,3,H,W].
        """
        key = self._keys([pairs], pairs.device, pairs=True)[0] if self.store is not None else ""
        kept = self.store.get(key) if key else None
        if kept is not None:
            return torch.from_numpy(kept["flow"]).to(pairs.device)
        both = torch.ones(1, 2, dtype=torch.bool, device=pairs.device)
        with torch.autocast(pairs.device.type, enabled=False), full_precision_convolutions():
            field = self._finished(torch.cat([self._between(pair[None], both)[:, :1] for pair in pairs], dim=1))
        if key:
            self.store.put(key, {"flow": field.cpu().numpy()})
        return field

    def _finished(self, field: Tensor) -> Tensor:
        field = resize_flow(field, self.flow_size or field.shape[-2:])
        return radius_normalised(field) if self.normalise else field

    def _given(self, frames: Tensor, flow: Tensor | None, flow_mask: Tensor | None) -> Tensor:
        if flow is None:
            raise LstpError(
                f"flow '{self.name}' takes the flow that the data set reads, and this batch has none; set "
                f"datasets.<name>.flow: {self.name}, or choose model.flow.name: dis"
            )
        fields = (frames if flow_mask is None else flow_mask).shape[:2]
        if flow.ndim != 5 or flow.shape[:3] != (*fields, 2):
            raise LstpError(
                f"flow '{self.name}': expected [B,T] = {list(fields)} fields of 2 planes, "
                f"got flow of shape {list(flow.shape)}"
            )
        return flow.to(device=frames.device, dtype=torch.float32)

    def _between(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Fields of all pairs of real frames; zero elsewhere."""
        field = torch.zeros(*frames.shape[:2], 2, *frames.shape[-2:], device=frames.device)
        rows, steps = torch.nonzero(mask[:, :-1] & mask[:, 1:], as_tuple=True)
        if len(rows):
            field[rows, steps] = self.estimator(frames, rows, steps)
        return field


@contextlib.contextmanager
def full_precision_convolutions() -> Iterator[None]:
    """No TF32 in cuDNN's convolutions for the block; nothing elsewhere."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def repeat_last(field: Tensor, mask: Tensor) -> Tensor:
    """The last pair's field also for the last real frame, zero for padding and for clips of one frame.

    Args:
        field: [B,T,2,h,w]; entry t is pair (t, t+1).
        mask: bool [B,T].
    """
    pair = mask & torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    field = torch.where(pair[:, :, None, None, None], field, torch.zeros((), device=field.device))
    after = torch.cat([torch.zeros_like(pair[:, :1]), pair[:, :-1]], dim=1) & ~pair & mask
    rows, steps = torch.nonzero(after, as_tuple=True)
    field[rows, steps] = field[rows, steps - 1]
    return field


def resize_flow(field: Tensor, size: Sequence[int]) -> Tensor:
    """[B,T,2,h,w] on another grid (bilinear), its values in px of that grid."""
    height, width = size
    old_height, old_width = field.shape[-2:]
    if (height, width) == (old_height, old_width):
        return field
    batch, length = field.shape[:2]
    smaller = height < old_height or width < old_width
    planes = F.interpolate(
        field.flatten(0, 1), size=(height, width), mode="bilinear", align_corners=False, antialias=smaller
    )
    scale = planes.new_tensor([width / old_width, height / old_height])
    return (planes * scale[:, None, None]).unflatten(0, (batch, length))


def radius_normalised(field: Tensor) -> Tensor:
    """[B,T,2,h,w] over the largest displacement of its clip + 1e-5, as in published training (SPEC 5)."""
    radius = field.square().sum(2).sqrt().flatten(1).amax(1)
    return field / (radius + 1e-5)[:, None, None, None, None]


def _padded(images: Tensor, minimum: int, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """[N,C,H,W] grown by repeating its edges, and where the old one begins (top, left)."""
    height, width = images.shape[-2:]
    extra = [max(minimum, -(-n // multiple) * multiple) - n for n in (height, width)]
    top, left = extra[0] // 2, extra[1] // 2
    if not any(extra):
        return images, (0, 0)
    edges = (left, extra[1] - left, top, extra[0] - top)
    return F.pad(images, edges, mode="replicate"), (top, left)


class RaftFlow:
    """RAFT of torchvision, equal to the published network under a key map (SPEC 5). The network is `net`."""

    def __init__(
        self,
        name: str,
        *,
        weights: str | os.PathLike | None,
        iterations: int = 20,
        pairs_at_once: int = 8,
        published_input: bool = False,
    ):
        from torchvision.models import optical_flow

        if iterations < 1 or pairs_at_once < 1:
            got = f"{iterations} and {pairs_at_once}"
            raise ConfigError(f"expected iterations and pairs_at_once of at least 1, got {got}")
        self.iterations, self.pairs_at_once, self.published_input = iterations, pairs_at_once, published_input
        self.net = getattr(optical_flow, name)(weights=None, progress=False).requires_grad_(False).eval()
        if weights != UNINITIALISED:
            load_raft(self.net, name, weights)

    def identity(self) -> dict[str, Any]:
        """Return what decides a field beside the frames, as JSON values."""
        digest = hashlib.sha256()
        for weight in self.net.state_dict().values():
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        settings = {"iterations": self.iterations, "published_input": self.published_input}
        return {**settings, "weights": digest.hexdigest(), "torch": torch.__version__}

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [N,3,H,W] to what the network takes: [-1,1], or the published demo's input (SPEC 0)."""
        images = images.float()
        if self.published_input:
            mean, std = images.new_tensor(IMAGE_MEAN), images.new_tensor(IMAGE_STD)
            images = (images / 255 - mean[:, None, None]) / std[:, None, None]
        return 2 * (images / 255) - 1

    def __call__(self, frames: Tensor, rows: Tensor, steps: Tensor) -> Tensor:
        """float32 [N,2,H,W]: the fields of pairs (frames[rows, steps], frames[rows, steps + 1])."""
        height, width = frames.shape[-2:]
        fields = []
        for row, step in zip(rows.split(self.pairs_at_once), steps.split(self.pairs_at_once), strict=True):
            both = torch.cat([frames[row, step], frames[row, step + 1]])
            images, (top, left) = _padded(self.normalise(both), RAFT_MIN_SIDE, 8)
            first, second = images.chunk(2)
            field = self.net(first, second, num_flow_updates=self.iterations)[-1]
            fields.append(field[..., top : top + height, left : left + width].float())
        return torch.cat(fields)


def load_raft(net: nn.Module, name: str, weights: str | os.PathLike | None) -> None:
    """Loads torchvision's or the published weights, strictly.

    Raises:
        WeightsError: no such file, not weights, or of another network.
    """
    url = RAFT_URLS[name]
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if weights is not None:
        path = local_path(weights) or Path(weights)
    if not os.path.isfile(path):
        if weights is None:
            where = f"download {url} (nothing is downloaded by itself), put it there as {path}"
        else:
            where = f"got weights: {weights}, where there is no file; {where_to_put(str(weights))}"
        raise WeightsError(
            f"flow '{name}' needs its weights: {where}, or set model.flow.weights to the file (torchvision's: {url}; "
            "published LSTP: raft-sintel.pth of princeton-vl/RAFT); flow 'dis' needs none"
        )
    state = {key.removeprefix("module."): value for key, value in load_state_dict_file(path).items()}
    try:
        if any(key.startswith(("fnet.", "cnet.")) for key in state):
            state = convert_published(state)
        load_strict(net, state, what="its weights")
    except WeightsError as error:
        raise WeightsError(f"{path}: does not hold {name}: {error}; expected the keys of {url}") from None


class DisFlow:
    """Dense inverse search of OpenCV (Kroeger et al., ECCV 2016): no weights, a few ms a pair, on the CPU."""

    def __init__(self, preset: str = "medium"):
        if preset not in DIS_PRESETS:
            raise ConfigError(unknown_name("dis_preset", preset, DIS_PRESETS))
        self.preset = preset

    def identity(self) -> dict[str, Any]:
        """Return what decides a field beside the frames, as JSON values."""
        import cv2

        return {"preset": self.preset, "opencv": cv2.__version__}

    def __call__(self, frames: Tensor, rows: Tensor, steps: Tensor) -> Tensor:
        """float32 [N,2,H,W]; each frame is turned to grey once."""
        import cv2

        dis = cv2.DISOpticalFlow_create(DIS_PRESETS.index(self.preset))
        grey: dict[tuple[int, int], tuple[np.ndarray, int, int]] = {}
        height, width = frames.shape[-2:]

        def image(row: int, step: int) -> tuple[np.ndarray, int, int]:
            if (row, step) not in grey:
                picture = frames[row, step].permute(1, 2, 0).cpu().numpy()
                extra = [max(0, DIS_MIN_SIDE - n) for n in picture.shape[:2]]
                top, left = extra[0] // 2, extra[1] // 2
                picture = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
                picture = cv2.copyMakeBorder(picture, top, extra[0] - top, left, extra[1] - left, cv2.BORDER_REPLICATE)
                grey[row, step] = picture, top, left
            return grey[row, step]

        fields = np.empty((len(rows), 2, height, width), dtype=np.float32)
        for n, (row, step) in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
            first, top, left = image(row, step)
            second, _, _ = image(row, step + 1)
            field = dis.calc(first, second, None)
            fields[n] = field[top : top + height, left : left + width].transpose(2, 0, 1)
            grey.pop((row, step))
        return torch.from_numpy(fields).to(frames.device)
