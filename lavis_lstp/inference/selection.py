"""`lavis_lstp.select(video, question, k)`: the frames of a film that a question asks for, with their true times.

In: a video file, a question and a method. Out: a `Selection`: frame numbers in the file, seconds, scores of the
candidates and how long each stage took; as JSON, as pictures, and as what transformers' video processors are told.
Evenly spaced or random frames, key frames, bit cost and motion need neither torch nor LAVIS; every other method asks
the temporal sampler of a checkpoint for scores and chooses by a rule of `models/where/selectors.py`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lavis_lstp.config.model import SELECTORS
from lavis_lstp.data.frame_numbers import uniform_centres
from lavis_lstp.data.video.codec_figures import motion_energy, of_candidates, packet_costs
from lavis_lstp.data.video.reading import probe, read_frames
from lavis_lstp.errors import ConfigError, VideoError, unknown_name
from lavis_lstp.files import read_record, sha256_file, write_json
from lavis_lstp.models.where import selectors
from lavis_lstp.schema import Span

WITHOUT_NETWORK = ("uniform", "random", "keyframes", "bitcost", "motion")
RULES = tuple(name for name, kind in SELECTORS.items() if "scores" in kind.needs)
"""Rules over scores: of the temporal sampler, or of what the codec says."""
BY_SAMPLER = ("lstp", *RULES)
METHODS = (*WITHOUT_NETWORK, *BY_SAMPLER)
CODEC_CANDIDATES = 512
"""Equal parts of a video whose bit cost or motion is one score."""
FORMAT, VERSION = "lavis_lstp.selection", 1
MILLISECONDS = 1000.0
"""Frames a second of the clock on which times that keep no rate are told."""


@dataclass(frozen=True)
class Selection:
    """K frames of a video, chosen for a question.

    Attributes:
        video: the file's path as it was given; sha256: of its content.
        question, method, settings: what they were chosen by.
        frame_index: K frame numbers in the file, ascending; times_s: their seconds since its start.
        candidate_index, candidate_times_s: the T frames that were candidates; scores: one for each, None where the
            method has none.
        span_s: start and end in seconds of the span they come from, None where the method has none.
        num_filled: of the K, those that the rule did not choose itself; see `selectors.choose`.
        num_frames, fps, duration_s: of the video.
        seconds: by stage.
    """

    video: str
    sha256: str
    question: str
    method: str
    settings: dict[str, Any]
    frame_index: list[int]
    times_s: list[float]
    candidate_index: list[int]
    candidate_times_s: list[float]
    scores: list[float] | None
    span_s: tuple[float, float] | None
    num_filled: int
    num_frames: int
    fps: float
    duration_s: float
    seconds: dict[str, float] = field(default_factory=dict)

    def frames(self, size: int | tuple[int, int] | None = None) -> np.ndarray:
        """uint8 [K,3,H,W], RGB, at the video's own size or `size` px.

        Raises:
            VideoError: the file is gone, or its content is not what was selected from.
        """
        if sha256_file(self.video) != self.sha256:
            raise VideoError(f"{self.video}: is not the video that these frames were selected from; select again")
        return read_frames(self.video, indices=self.frame_index, size=size).frames

    def video_metadata(self) -> Any:
        """transformers' `VideoMetadata` of the frames, for `do_sample_frames=False`.

        Frame numbers over the frame rate are the true seconds; where the file keeps no rate or begins late, the clock
        is one of milliseconds.
        """
        from transformers.video_utils import VideoMetadata

        fps, numbers, total = timing(self.frame_index, self.times_s, self.fps, self.num_frames, self.duration_s)
        return VideoMetadata(total_num_frames=total, fps=fps, duration=self.duration_s, frames_indices=numbers)

    def to_json(self) -> dict[str, Any]:
        """A mapping that `from_json` reads."""
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, given: Mapping[str, Any], source: str = "selection") -> Selection:
        """Return what `to_json` gave.

        Raises:
            ConfigError: another format or version, or a field is missing or of another kind.
        """
        names = {one.name for one in dataclasses.fields(cls)}
        if not isinstance(given, Mapping) or (given.get("format"), given.get("version")) != (FORMAT, VERSION):
            raise ConfigError(f"{source}: not a selection (format {FORMAT}, version {VERSION}); select again")
        if missing := sorted(names - given.keys()):
            raise ConfigError(f"{source}: a selection without {', '.join(missing)}; select again")
        values = {name: given[name] for name in names}
        numbers = values["frame_index"], values["times_s"]
        if not all(isinstance(one, list) for one in numbers) or len(numbers[0]) != len(numbers[1]):
            raise ConfigError(f"{source}: frame_index and times_s must be lists of equal length")
        if not all(type(i) is int and 0 <= i < values["num_frames"] for i in numbers[0]):
            raise ConfigError(f"{source}: frame_index must be frame numbers below num_frames")
        values["span_s"] = None if values["span_s"] is None else tuple(values["span_s"])
        return cls(**values)

    @classmethod
    def read(cls, path: str | os.PathLike) -> Selection:
        """From a JSON file that `write` made; errors as in `from_json`."""
        return cls.from_json(read_record(path, error=ConfigError), str(path))

    def write(self, path: str | os.PathLike) -> None:
        """To a JSON file, complete or not at all."""
        write_json(path, self.to_json())


def timing(
    numbers: Sequence[int], times_s: Sequence[float], fps: float, total: int, duration_s: float
) -> tuple[float, list[int], int]:
    """Frames a second, frame numbers and number of frames under which number / rate is each frame's true time.

    They are the file's own where these tell its times to 2 ms, else milliseconds.
    """
    if all(abs(number / fps - seconds) < 2 / MILLISECONDS for number, seconds in zip(numbers, times_s, strict=True)):
        return fps, list(numbers), total
    return MILLISECONDS, [round(seconds * MILLISECONDS) for seconds in times_s], round(duration_s * MILLISECONDS)


def select(
    video: str | os.PathLike,
    question: str = "",
    k: int = 8,
    method: str = "lstp",
    *,
    seed: int = 0,
    num_candidates: int | None = None,
    candidates_per_s: float | None = None,
    predictor: Any = None,
    **settings: Any,
) -> Selection:
    """Chooses k frames of a video for a question.

    Args:
        method: uniform, random, keyframes, bitcost, motion (none of which reads the question); lstp, the frames of the
            span that the temporal sampler predicts; or a rule over its scores: topk, aks, inverse_transform, focus,
            global_local.
        seed: of methods that draw.
        num_candidates: T, evenly spaced frames that are scored; default 512 parts for bitcost and motion, else as many
            as the sampler's run read.
        candidates_per_s: of methods by the sampler: so many frames a second, where these are at most num_candidates.
        predictor: of `lavis_lstp.load`, whose sampler is asked; None = the shipped tiny example's.
        settings: of the rule, such as `power` of inverse_transform. bitcost and motion take `rule`, the name of a rule
            (default inverse_transform), and its settings.

    Returns:
        All frames of a video that has no more than k; by lstp, all candidates of a span that has no more.

    Raises:
        ConfigError: unknown method or setting, or a value that cannot be used.
        VideoError: the file is missing or not a readable video.
    """
    if method not in METHODS:
        raise ConfigError(unknown_name("method to select frames", method, METHODS))
    if type(k) is not int or k < 1:
        raise ConfigError(f"k must be a whole number of at least 1, got {k!r:.80}")
    if method == "lstp" and settings:
        raise ConfigError(f"method lstp has no settings, got {', '.join(settings)}")
    if method in BY_SAMPLER and not question.strip():
        raise ConfigError(f"method {method} needs a question; uniform, keyframes, bitcost and motion need none")
    if candidates_per_s is not None and method not in BY_SAMPLER:
        raise ConfigError(f"candidates_per_s is of methods that ask the sampler, the method is {method}")
    seconds: dict[str, float] = {}
    with _timed(seconds, "index"):
        info = probe(video)
        digest = sha256_file(video)
    if method in BY_SAMPLER:
        read = {"num_frames": num_candidates, "fps": candidates_per_s}
        found = _by_sampler(video, question, k, method, seed, read, predictor, settings, seconds)
    else:
        found = _by_codec(video, k, method, seed, num_candidates or CODEC_CANDIDATES, settings, seconds)
    return Selection(
        video=os.fspath(video),
        sha256=digest,
        question=question,
        method=method,
        num_frames=info.num_frames,
        fps=info.fps,
        duration_s=info.duration_s,
        seconds={stage: round(value, 4) for stage, value in seconds.items()},
        **found,
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started


def _by_codec(video, k: int, method: str, seed: int, parts: int, settings: dict, seconds: dict) -> dict[str, Any]:
    """Frames by what the file says of itself."""
    with _timed(seconds, "codec"):
        costs = packet_costs(video)
    every = np.arange(len(costs.times_s))
    candidates, scores, rule = every, None, method
    if method == "keyframes":
        candidates, rule = every[costs.is_key], "uniform"
    elif method in ("bitcost", "motion"):
        with _timed(seconds, "scores"):
            figure = costs.num_bytes if method == "bitcost" else motion_energy(video)
            candidates = np.asarray(uniform_centres(min(parts, len(every)), len(every)))
            scores = of_candidates(figure, candidates)
        rule = settings.pop("rule", "inverse_transform")
        if rule not in RULES:
            raise ConfigError(unknown_name(f"rule of method {method}", str(rule), RULES))
    row = selectors.Row(
        scores=scores,
        num_selected=k,
        times_s=costs.times_s[candidates],
        question="",
        rng=np.random.default_rng(seed),
    )
    with _timed(seconds, "rule"):
        used = selectors.selector_settings(rule, settings)
        chosen = selectors.choose(rule, row, **settings)
    if scores is not None:
        used |= {"rule": rule}
    if method == "random":
        used |= {"seed": seed}
    index = candidates[chosen.frames]
    told = candidates if scores is not None else index
    return {
        "settings": {"k": k, **used},
        "frame_index": index.tolist(),
        "times_s": costs.times_s[index].round(6).tolist(),
        "candidate_index": told.tolist(),
        "candidate_times_s": costs.times_s[told].round(6).tolist(),
        "scores": None if scores is None else scores.round(4).tolist(),
        "span_s": None,
        "num_filled": chosen.num_filled,
    }


def _by_sampler(video, question, k, method, seed, read, predictor, settings, seconds) -> dict[str, Any]:
    """Frames by what the temporal sampler of a checkpoint sees in them."""
    if predictor is None:
        from lavis_lstp.inference.predictor import load

        with _timed(seconds, "load"):
            predictor = load("example")
    given = {name: value for name, value in read.items() if value is not None}
    how = predictor.settings(selector=method, num_selected=k, seed=seed, rule=settings, **given)
    asked = predictor.prepare(Path(video), question, settings=how)
    with _timed(seconds, "sampler"):
        choice = predictor.choose(asked)
    media = asked.candidates
    index = [i for i in dict.fromkeys(choice.frame_index[0].tolist()) if i >= 0]
    times, span_s = media.times_s, None
    if method == "lstp":
        span_s = tuple(round(edge, 6) for edge in Span(*choice.span[0].tolist()).to_seconds(times, media.duration_s))
    for stage, value in asked.seconds.items():
        seconds[stage] = seconds.get(stage, 0.0) + value
    return {
        "settings": {"k": k, "num_candidates": len(times), **how.selector.settings},
        "frame_index": [media.numbers[i] for i in index],
        "times_s": [round(float(times[i]), 6) for i in index],
        "candidate_index": list(media.numbers),
        "candidate_times_s": times.round(6).tolist(),
        "scores": None if choice.scores is None else [round(s, 4) for s in choice.scores[0].tolist()],
        "span_s": span_s,
        "num_filled": 0 if choice.num_filled is None else int(choice.num_filled[0]),
    }
