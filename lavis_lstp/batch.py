"""Rows of a batch: which are videos, a part of them, and a stand-in where there is none.

In and out: samples (`lavis_lstp.schema`) with the batch axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lavis_lstp.errors import ConfigError
from lavis_lstp.schema import Batch, Sample

TEXTS = ("text_input", "text_output", "prompt")


def readable(samples: Batch) -> Batch:
    """The batch with a list of texts under each key of texts; one text alone stands for all rows, as in LAVIS.

    Raises:
        ConfigError: keys are missing, or a key has more or fewer texts than there are rows.
    """
    missing = [key for key in ("frames", "frame_mask", "text_input") if key not in samples]
    if missing:
        known = ("image", "prompt")
        hint = "image and prompt are keys of LAVIS's BLIP-2; " if any(key in samples for key in known) else ""
        raise ConfigError(
            f"samples have no {', '.join(missing)}, but {', '.join(sorted(map(str, samples)))}; {hint}LSTP reads "
            "frames (uint8 [B,T,3,H,W], 0 to 255, T = 1 for an image), frame_mask (int64 [B,T], 1 = real) and "
            "text_input (B questions)"
        )
    count = len(samples["frame_mask"])
    alone = {key: [samples[key]] * count for key in TEXTS if isinstance(samples.get(key), str)}
    read = {**samples, **alone} if alone else samples
    for key in TEXTS:
        if key in read and len(read[key]) != count:
            raise ConfigError(f"samples have {len(read[key])} texts in {key} for {count} rows; expected one for each")
    return read


def with_equal_keys(samples: Iterable[Sample]) -> list[Sample]:
    """The samples, each with the keys that only some bring: flow_mask, whose others have one field for each frame,
    any_span, whose others have one span, and no_moment."""

    def filled(sample: Sample) -> Sample:
        own: Sample = {"no_moment": torch.tensor(0)} if "no_moment" in found else {}
        if "flow_mask" in found and "flow" in sample:
            own["flow_mask"] = sample["flow"].new_ones(len(sample["flow"])).long()
        if "any_span" in found:
            own["any_span"] = sample["span"][None]
        return {**own, **sample}

    samples = list(samples)
    found = {key for sample in samples for key in ("no_moment", "flow_mask", "any_span") if key in sample}
    return [filled(sample) for sample in samples] if found else samples


def moves(samples: Batch) -> Tensor:
    """bool [B] on the CPU: two frames or more. Images and texts have no flow and no span."""
    return samples["frame_mask"].sum(dim=1).cpu() > 1


def distinct_media(samples: Batch) -> tuple[Tensor, Tensor]:
    """Rows whose frames differ, and whose frames each row has, by `media`; without it every row has its own.

    Returns:
        int64 [U], the first row of each; int64 [B], the place of each row's frames among these.
    """
    names = samples.get("media") or [""] * len(samples["frame_mask"])
    first: dict[str, int] = {}
    for row, name in enumerate(names):
        first.setdefault(name or f"row {row}", row)
    place = {name: i for i, name in enumerate(first)}
    which = [place[name or f"row {row}"] for row, name in enumerate(names)]
    return torch.tensor(list(first.values())), torch.tensor(which)


def chosen_frames(
    samples: Batch, frame_index: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The frames that are shown, each once, however many questions chose it.

    Args:
        frame_index: int64 [B,K], of the samples' frames, -1 = none.
        rows: int64 [B], the sample that each row is of; None = one row a sample.

    Returns:
        frames uint8 [U,3,H,W], in the order of video and time; int64 [B,K], the place of each chosen frame among these,
        -1 = none; seconds float32 [B,K] where the samples have times, 0 where there is no frame. A batch of texts
        alone has one black frame that no row is shown, so that each rank runs the same modules.
    """
    frames, index = samples["frames"], frame_index.cpu()
    real = index >= 0
    rows = torch.arange(len(index)) if rows is None else rows
    times = None
    if "frame_times" in samples and samples["frame_times"].shape[1]:
        times = samples["frame_times"].cpu()[rows].gather(1, index.clamp(min=0)).masked_fill(~real, 0.0)
    if not real.any():
        return frames.new_zeros(1, *frames.shape[2:]), index, times
    first, which = distinct_media(samples)
    owner = which[rows][:, None].expand_as(index)
    pairs, place = torch.unique(torch.stack([owner[real], index[real]], dim=1), dim=0, return_inverse=True)
    chosen = frames[first[pairs[:, 0]].to(frames.device), pairs[:, 1].to(frames.device)]
    return chosen, torch.full_like(index, -1).masked_scatter(real, place), times


def several_ranks() -> bool:
    """Whether other processes take part, who wait in collectives until this one runs the same modules."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def weights_are_divided(model: nn.Module) -> bool:
    """Among ranks (ZeRO-3): each must then run the same modules in the same order, also those without weights."""
    return several_ranks() and hasattr(next(model.parameters()), "ds_id")


def in_pieces(items: Sequence, size: int, model: nn.Module) -> Iterator[Sequence]:
    """`items`, `size` at a time; where the model's weights are divided among ranks (ZeRO-3), as often on each.

    There a module cannot be run on one rank alone, so ranks with fewer items get empty pieces at the end, for which
    they run something that counts for nothing. Elsewhere ranks go their own ways, and may be asked other often.
    """
    count = -(-len(items) // size)
    if weights_are_divided(model):
        most = torch.tensor([count], device=next(model.parameters()).device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        count = int(most)
    for i in range(count):
        yield items[i * size : (i + 1) * size]


def take_rows(samples: Batch, rows: Tensor) -> dict:
    """The rows at `rows`, int64 [R] on the CPU, of everything that is by row; the rest stays as it is."""
    count, picked = len(samples["text_input"]), rows.tolist()
    taken = {}
    for key, value in samples.items():
        if torch.is_tensor(value) and value.ndim and len(value) == count:
            taken[key] = value[rows.to(value.device)]
        else:
            taken[key] = [value[i] for i in picked] if isinstance(value, list) and len(value) == count else value
    return taken


def blank_video(samples: Batch) -> dict:
    """A batch of one video of two black frames, with the keys that the path to the sampler reads."""
    blank = {
        "frames": samples["frames"].new_zeros(1, 2, *samples["frames"].shape[2:]),
        "frame_mask": samples["frame_mask"].new_ones(1, 2),
        "text_input": samples["text_input"][:1],
    }
    if "flow" in samples:
        blank["flow"] = samples["flow"].new_zeros(1, 2, *samples["flow"].shape[2:])
    return blank


def is_hidden(samples: Batch, row: int) -> bool:
    """Return True where the data say that the answer is not known; LAVIS's data have other things under this key."""
    answers = samples.get("answer")
    return isinstance(answers, list) and len(answers) == len(samples["text_output"]) and answers[row] is None
