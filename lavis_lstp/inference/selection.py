"""`lavis_lstp.select(video, question, k)`: the frames of a film that a question asks for, with their true times.

In: a video file, a question and a method. Out: a `Selection`: frame numbers in the file, seconds, scores of the
candidates and how long each stage took; as JSON, as pictures, and as what transformers' video processors are told.
Evenly spaced or random frames, key frames, bit cost and motion need neither torch nor LAVIS; every other method is a
rule of `models/where/selectors.py` over scores, of the temporal sampler of a checkpoint or of another scorer
(`models/where/scorers.py`). What was read and computed of a video is kept on disk (`data/store.py`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lavis_lstp.config.fields import checked
from lavis_lstp.config.model import SELECTORS, scorer_settings
from lavis_lstp.config.model import Served as ServedSettings
from lavis_lstp.data.annotation import MOST_SECONDS, check_seconds
from lavis_lstp.data.pictures import open_picture, picture_size
from lavis_lstp.data.selections import FORMAT, VERSION, Recorded, timing
from lavis_lstp.data.store import content_digest, default_store, kept_motion
from lavis_lstp.data.video.choosing import check_inside, frames_between, key_frames, spread_evenly
from lavis_lstp.data.video.codec_figures import PacketCosts, of_candidates, packet_costs
from lavis_lstp.data.video.index import VideoIndex, VideoInfo, video_index
from lavis_lstp.data.video.picture_folder import folder_index, pictures_in
from lavis_lstp.data.video.reading import (
    READING_VERSION,
    probe,
    read_frames,
    resize_frames,
)
from lavis_lstp.errors import ConfigError, VideoError, unknown_name
from lavis_lstp.files import read_record, strict_json, write_json
from lavis_lstp.inference.candidates import DECODE_THREADS, is_picture
from lavis_lstp.models.where import selectors
from lavis_lstp.schema import Span

SCORELESS = ("uniform", "random", "keyframes")
WITHOUT_NETWORK = (*SCORELESS, "bitcost", "motion")
RULES = tuple(name for name, kind in SELECTORS.items() if "scores" in kind.needs and "features" not in kind.needs)
"""Rules over scores: of the temporal sampler, of another scorer, or of what the codec says."""
BY_SCORER = (*RULES, *(name for name, kind in SELECTORS.items() if "features" in kind.needs))
BY_SAMPLER = ("lstp", *BY_SCORER)
METHODS = (*WITHOUT_NETWORK, *BY_SAMPLER)
SCORED_AT_ONCE = 64
"""Candidates that a scorer looks at where a call does not say."""
CODEC_CANDIDATES = 512
"""Equal parts of a video whose bit cost or motion is one score."""


KINDS = {
    **dict.fromkeys(("video", "sha256", "question", "method"), str),
    **dict.fromkeys(("settings", "seconds"), dict),
    **dict.fromkeys(("frame_index", "times_s", "candidate_index", "candidate_times_s"), list),
    **dict.fromkeys(("num_filled", "num_frames"), int),
    **dict.fromkeys(("fps", "duration_s"), (int, float)),
    **{"scores": (list, type(None)), "span_s": (list, tuple, type(None))},
}
"""Kinds of a recorded selection's values; lists, and the seconds of stages, are numbers."""


@dataclass(frozen=True)
class Selection:
    """K frames of a video, chosen for a question.

    Attributes:
        video: the file's path as it was given; sha256: of its content.
        question, method, settings: what they were chosen by; settings hold how candidates were read in fact, which is
            exact where key frames were asked for and the file has too few.
        frame_index: K frame numbers in the file, ascending; times_s: their seconds since its start.
        candidate_index, candidate_times_s: the frames that were scored, all T candidates or the few that a rule like
            focus asks for; scores: one for each, None where nothing was scored, and then they are the chosen frames.
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
        if content_digest(self.video, default_store()) != self.sha256:
            raise VideoError(f"{self.video}: is not the video that these frames were selected from; select again")
        if is_picture(self.video):
            picture = np.asarray(open_picture(Path(self.video), self.video)).transpose(2, 0, 1)[None]
            return picture if size is None else resize_frames(picture, size)
        return read_frames(self.video, indices=self.frame_index, size=size).frames

    def answer(
        self, model: str, prompt: str = "{question}", *, endpoint: Mapping[str, Any] | None = None, **how: Any
    ) -> str:
        """What a model behind an OpenAI-compatible server answers, shown these frames with their seconds.

        Neither torch nor weights are needed; address and key come from OPENAI_BASE_URL and OPENAI_API_KEY.

        Args:
            model: as the server calls it.
            prompt: what it reads, with {question}.
            endpoint: some of the keys of `config.model.Served`, such as {"frames": "images"}.
            how: times_in_prompt, and transformers' generation arguments such as max_new_tokens.

        Raises:
            ConfigError: a setting that cannot be used, or no key in the environment.
            EndpointError: no answer came.
            VideoError: as for `frames`.
        """
        from lavis_lstp.models.answer.served import Served, jpeg

        asked = {**vars(ServedSettings()), **checked(endpoint or {}, ServedSettings, "endpoint")}
        served = Served(model, times_in_prompt=how.pop("times_in_prompt", False), **asked)
        pictures = [jpeg(frame) for frame in self.frames(served.image_size)]
        request = served.request(pictures, prompt.replace("{question}", self.question), self.times_s, how)
        return served.answers([request])[0][0]

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
        for name, kinds in KINDS.items():
            value = values[name]
            numbers = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else ()
            known = name == "settings" or all(type(one) in (int, float) for one in numbers)
            if not (known and isinstance(value, kinds)):
                raise ConfigError(f"{source}: {name} is not of the form of a selection: {value!r:.80}; select again")
        numbers = values["frame_index"], values["times_s"]
        if len(numbers[0]) != len(numbers[1]) or len(values["span_s"] or (0, 0)) != 2:
            raise ConfigError(f"{source}: frame_index and times_s must be of equal length, span_s two seconds")
        if not all(type(i) is int and 0 <= i < values["num_frames"] for i in numbers[0]):
            raise ConfigError(f"{source}: frame_index must be frame numbers below num_frames")
        values["span_s"] = None if values["span_s"] is None else tuple(values["span_s"])
        return cls(**values)

    @classmethod
    def recorded(cls, video: str | os.PathLike, question: str, found: Recorded) -> Selection:
        """Frames that were recorded for a question, of our own or another selector, with their times in the file.

        Raises:
            ConfigError: the video is not the one that they were selected from, or has no such frame.
            VideoError: the file is missing or not a readable video.
        """
        info, digest, times = probe(video), content_digest(video, default_store()), _costs(video).times_s
        found.check_video(lambda: digest, str(video))
        numbers = found.numbers
        if numbers is None:
            numbers = sorted({int(np.abs(times - seconds).argmin()) for seconds in found.times_s})
        if numbers[-1] >= len(times) or (found.times_s and found.times_s[-1] > info.duration_s + 1):
            raise ConfigError(f"{video}: has no such frame as was recorded for it ({numbers[-1]}); it is another video")
        told = {"frame_index": list(numbers), "times_s": times[list(numbers)].round(6).tolist()}
        return cls(
            video=os.fspath(video),
            sha256=digest,
            question=question,
            method="recorded",
            settings={"k": len(numbers)},
            candidate_index=told["frame_index"],
            candidate_times_s=told["times_s"],
            scores=None,
            span_s=None,
            num_filled=0,
            num_frames=info.num_frames,
            fps=info.fps,
            duration_s=info.duration_s,
            **told,
        )

    @classmethod
    def read(cls, path: str | os.PathLike) -> Selection:
        """From a JSON file that `write` made; errors as in `from_json`."""
        return cls.from_json(read_record(path, error=ConfigError), str(path))

    def write(self, path: str | os.PathLike) -> None:
        """To a JSON file, complete or not at all."""
        write_json(path, self.to_json())


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
    scorer: str | Mapping[str, Any] | None = None,
    frames: str | None = None,
    flow_pairs: str | None = None,
    clip_s: Sequence[float] | None = None,
    **settings: Any,
) -> Selection:
    """Chooses k frames of a video for a question.

    Args:
        video: a file, or a folder of pictures, three a second (not for keyframes, bitcost and motion).
        method: uniform, random, keyframes, bitcost, motion (none of which reads the question); lstp, the frames of the
            span that the temporal sampler predicts; or a rule over its scores: topk, aks, inverse_transform, focus,
            global_local; mmr and dpp, which also compare the frames, by the scorer's features or the answering model's.
        seed: of methods that draw.
        num_candidates: T, evenly spaced frames that are scored; default 512 parts for bitcost and motion, else as many
            as the sampler's run read, or 64 for a scorer. uniform, random and keyframes score none and take none.
        candidates_per_s: of methods by the sampler: so many frames a second, where these are at most num_candidates.
        predictor: of `lavis_lstp.load`, whose sampler is asked; None = the shipped tiny example's.
        scorer: in place of the sampler: a name of `config.model.SCORERS`, "NAME=WEIGHTS", or a mapping of its settings
            (`config.model.Scorer`). It is asked about whole frames, and no answering model is loaded. answerer asks
            the predictor, which must be loaded with model.scorer.name=answerer.
        frames: exact, or keyframe: the nearest key frames are the candidates, several times faster.
        flow_pairs: sampled or local, for the sampler; these two as the predictor's run read, where they are None.
        clip_s: start and end in seconds of the part of the video that the question is about; None = all of it. The end
            may be infinite. Frame numbers and seconds stay those of the file.
        settings: of the rule, such as `power` of inverse_transform. bitcost and motion take `rule`, the name of a rule
            (default inverse_transform), and its settings.

    Returns:
        All frames of a video that has no more than k, and of a picture; by lstp, all candidates of a span that has no
        more.

    Raises:
        ConfigError: unknown method or setting, or a value that cannot be used.
        VideoError: the file is missing or not a readable video, or the clip lies outside of it.
    """
    if clip_s is not None:
        start, end = clip_s
        check_seconds([start, min(end, MOST_SECONDS)], "clip_s", os.fspath(video))
        clip_s = (start, probe(video).duration_s) if math.isinf(end) else (start, end)
    if method not in METHODS:
        raise ConfigError(unknown_name("method to select frames", method, METHODS))
    if type(k) is not int or k < 1:
        raise ConfigError(f"k must be a whole number of at least 1, got {k!r:.80}")
    if type(seed) is not int or seed < 0:
        raise ConfigError(f"seed must be a whole number of at least 0, got {seed!r:.80}")
    if num_candidates is not None and (type(num_candidates) is not int or num_candidates < 1):
        raise ConfigError(f"num_candidates must be a whole number of at least 1, got {num_candidates!r:.80}")
    if num_candidates is not None and method in SCORELESS:
        raise ConfigError(f"num_candidates is of methods that score frames, the method is {method}; leave it out")
    if method == "lstp" and settings:
        raise ConfigError(f"method lstp has no settings, got {', '.join(settings)}")
    if method not in WITHOUT_NETWORK and not question.strip():
        raise ConfigError(f"method {method} needs a question; {', '.join(WITHOUT_NETWORK)} need none")
    seconds: dict[str, float] = {}
    given = _scorer_of(method, scorer)
    by_predictor = given.get("name") in (None, "answerer")
    if candidates_per_s is not None and not (method in BY_SAMPLER and by_predictor):
        asked = f"the scorer is {given['name']}" if given else f"the method is {method}"
        raise ConfigError(f"candidates_per_s is of methods that ask the sampler, {asked}")
    if frames not in (None, "exact", "keyframe"):
        raise ConfigError(unknown_name("way to read candidates (frames)", str(frames), ("exact", "keyframe")))
    reading = {name: value for name, value in (("frames", frames), ("flow_pairs", flow_pairs)) if value is not None}
    if is_picture(video):
        rule, own = {"keyframes": "uniform"}.get(method, method), dict(settings)
        if method in ("bitcost", "motion"):
            rule = str(own.pop("rule", "inverse_transform"))
        if method != "lstp":
            selectors.selector_settings(rule, own)
        picture_size(Path(video), os.fspath(video))
        info, digest = VideoInfo(1, 1.0, 0.0, 0, 0, 0, ""), content_digest(video, default_store())
        found = {"settings": {"k": k, **settings}, "num_filled": 0} | _told([0], np.zeros(1), [0], None)
    elif method in BY_SAMPLER and by_predictor:
        _check_asks(predictor, given)
        read = {"num_frames": num_candidates, "fps": candidates_per_s}
        asked = (video, question, k, method, seed, read, predictor, settings, reading, clip_s)
        info, digest, found = _by_sampler(*asked, seconds)
    elif given:
        asked = (video, question, k, method, seed, num_candidates or SCORED_AT_ONCE, given, settings, reading, clip_s)
        info, digest, found = _by_scorer(*asked, seconds)
    elif reading:
        raise ConfigError(f"method {method} reads what it chooses among exactly; leave out {', '.join(reading)}")
    else:
        with _timed(seconds, "index"):
            info, digest = probe(video), content_digest(video, default_store())
        asked = (video, k, method, seed, num_candidates or CODEC_CANDIDATES, settings, clip_s)
        found = _by_codec(*asked, info.duration_s, digest, seconds)
    if clip_s is not None:
        found["settings"]["clip_s"] = list(clip_s)
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


def _scorer_of(method: str, scorer: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of the scorer that stands in for the sampler; {} = none does."""
    given = {} if scorer in (None, "sampler") else scorer_settings(scorer)
    if given and method not in BY_SCORER:
        raise ConfigError(f"method {method} asks no scorer; with one choose {', '.join(BY_SCORER)}")
    return given


def load_options(method: str, scorer: str | Mapping[str, Any] | None = None) -> list[str] | None:
    """Options of `lavis_lstp.load` for the predictor that a method asks, by its sampler or its answerer; None = nobody.

    Raises:
        ConfigError: an unknown method or scorer, or a scorer that the method does not go with.
    """
    if method not in METHODS:
        raise ConfigError(unknown_name("method to select frames", method, METHODS))
    name = _scorer_of(method, scorer).get("name")
    if method not in BY_SAMPLER or name not in (None, "answerer"):
        return None
    return [] if name is None else ["model.scorer.name=answerer", f"model.selector.name={method}"]


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the seconds that something takes, without those of stages within it."""
    started = time.perf_counter() - sum(seconds.values())
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started - sum(seconds.values())


def _inside(video, times_s: np.ndarray, clip_s: Sequence[float] | None, duration_s: float) -> np.ndarray:
    """int64 [N], numbers of the frames of a clip, or of all frames."""
    if clip_s is not None:
        check_inside(clip_s, "clip_s", duration_s, os.fspath(video))
    return np.asarray(frames_between(times_s, clip_s))


def _index(video: str | os.PathLike) -> VideoIndex:
    name = os.fspath(video)
    return folder_index(name, len(pictures_in(Path(video)))) if os.path.isdir(video) else video_index(video, name)


def _costs(video: str | os.PathLike) -> PacketCosts:
    """Return the packets' costs; of a folder of pictures only the times are known."""
    if not os.path.isdir(video):
        return packet_costs(video)
    index = _index(video)
    return PacketCosts(index.times_s, index.frame_bytes, index.frame_key)


def _by_codec(video, k, method, seed, parts, settings, clip_s, duration_s, digest, seconds) -> dict[str, Any]:
    """Frames by what the file says of itself."""
    if os.path.isdir(video) and method not in ("uniform", "random"):
        raise ConfigError(
            f"{video}: method {method} reads a video file, and this is a folder of pictures; take uniform"
        )
    with _timed(seconds, "codec"):
        costs = _costs(video)
    every = _inside(video, costs.times_s, clip_s, duration_s)
    clock = costs.times_s, duration_s, os.fspath(video), clip_s
    candidates, scores, rule = every, None, method
    if method == "keyframes":
        candidates, rule = every[costs.is_key[every]], "uniform"
        if not len(candidates):
            raise ConfigError(f"{video}: has no key frame from {clip_s[0]:g} to {clip_s[1]:g} s; choose another method")
    elif method in ("bitcost", "motion"):
        with _timed(seconds, "scores"):
            threads = min(DECODE_THREADS, os.cpu_count() or 1)
            given = default_store(), digest, video
            figure = costs.num_bytes if method == "bitcost" else kept_motion(*given, threads=threads)
            candidates = np.asarray(spread_evenly(parts, every, *clock))
            scores = of_candidates(figure[every], candidates - every[0])
        rule = settings.pop("rule", "inverse_transform")
        if rule not in RULES:
            raise ConfigError(unknown_name(f"rule of method {method}", str(rule), RULES))
    if rule == "uniform":
        candidates = np.asarray(spread_evenly(k, candidates, *clock))
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
    how = {"settings": {"k": k, **used}, "num_filled": chosen.num_filled}
    return how | _told(candidates, costs.times_s[candidates], chosen.frames, scores)


def _told(numbers: Any, times_s: np.ndarray, frames: list[int], scores: Any, span_s: Any = None) -> dict[str, Any]:
    """Fields of a selection.

    Args:
        numbers, times_s: of the T candidates in the file.
        frames: the chosen ones among them.
        scores: float [T], NaN where nobody asked; None = there are none.
    """
    scored = [] if scores is None else np.flatnonzero(~np.isnan(scores)).tolist()
    numbers = np.asarray(numbers)

    def facts(names: tuple[str, str], among: list[int]) -> dict[str, Any]:
        return dict(zip(names, (numbers[among].tolist(), times_s[among].round(6).tolist()), strict=True))

    return {
        **facts(("frame_index", "times_s"), frames),
        **facts(("candidate_index", "candidate_times_s"), scored or frames),
        "scores": np.asarray(scores)[scored].round(4).tolist() if scored else None,
        "span_s": span_s,
    }


@cache
def _example() -> Any:
    from lavis_lstp.inference.predictor import load

    return load("example", store=default_store())


def _check_asks(predictor: Any, given: Mapping[str, Any]) -> None:
    if given and getattr(predictor and predictor.model.chooser.frame_scorer, "answerer", None) is None:
        raise ConfigError(
            "scorer answerer asks the model that answers; give a predictor of load(..., "
            'options=["model.scorer.name=answerer", "model.selector.name=topk"])'
        )


@cache
def _scorer(given: str) -> Any:
    """A scorer of its settings, as JSON; it is built once."""
    from lavis_lstp.models.where.scorers import build_scorer

    made = build_scorer(**strict_json(given))
    made.store = default_store()
    return made


def _by_scorer(video, question, k, method, seed, num_candidates, given, settings, reading, clip_s, seconds):
    """The video's info and digest, and frames by what a scorer of single frames sees in them."""
    import torch

    from lavis_lstp.models.where.scorers import vectors

    if reading.pop("flow_pairs", None):
        raise ConfigError("flow_pairs is of the temporal sampler; a scorer looks at no flow")
    used = selectors.selector_settings(method, settings)
    with _timed(seconds, "load"):
        scorer = _scorer(json.dumps(given, sort_keys=True))
    with _timed(seconds, "index"):
        info, digest = probe(video), content_digest(video, default_store())
        index = _index(video)
        every = _inside(video, index.times_s, clip_s, info.duration_s)
        clock = index.times_s, info.duration_s, os.fspath(video), clip_s
        numbers = [int(i) for i in spread_evenly(num_candidates, every, *clock)]
        if reading.get("frames") == "keyframe":
            numbers = key_frames(index, numbers, clip_s)
        frames = _read_as(reading.get("frames", "exact"), video, numbers)

    def features(asked: list[int]) -> Any:
        def read(first: int, end: int) -> Any:
            with _timed(seconds, "decode"):
                return torch.from_numpy(read_frames(video, indices=asked[first:end]).frames)

        return scorer.features(len(asked), read, f"{digest} {asked} {READING_VERSION}")

    def score(candidates: np.ndarray) -> np.ndarray:
        with _timed(seconds, "scores"):
            return scorer.scores(features([numbers[i] for i in candidates]), question).double().numpy()

    times, scores = index.times_s[numbers], selectors.LazyScores(len(numbers), score)
    row = selectors.Row(scores, k, times, question, rng=np.random.default_rng(seed))
    if not selectors.asks_few(method):
        scores[np.arange(len(numbers))]
        row = dataclasses.replace(row, features=vectors(features(numbers)).numpy())
    with _timed(seconds, "rule"):
        chosen = selectors.choose(method, row, **settings)
    asked = {"k": k, "num_candidates": len(numbers), "frames": frames, **used, "scorer": given}
    how = {"settings": asked, "num_filled": chosen.num_filled}
    return info, digest, how | _told(numbers, times, chosen.frames, scores.known)


def _read_as(frames: str, video: str | os.PathLike, numbers: Sequence[int]) -> str:
    """Return how candidates were read: exact, too, where a video has too few key frames to tell them apart."""
    if frames == "keyframe" and not (os.path.isfile(video) and packet_costs(video).is_key[list(numbers)].all()):
        return "exact"
    return frames


def _by_sampler(video, question, k, method, seed, read, predictor, settings, reading, clip_s, seconds):
    """The video's info and digest, and frames by what the temporal sampler of a checkpoint sees in them."""
    if predictor is None:
        with _timed(seconds, "load"):
            predictor = _example()
    given = {name: value for name, value in (*reading.items(), *read.items()) if value is not None}
    how = predictor.settings(selector=method, num_selected=k, seed=seed, rule=settings, **given)
    asked = predictor.prepare(Path(video), question, settings=how, clip_s=clip_s)
    with _timed(seconds, "sampler"):
        choice = predictor.choose(asked)
    media = asked.candidates
    info, digest = media.info or probe(video), media.media.split()[0]
    index = [i for i in dict.fromkeys(choice.frame_index[0].tolist()) if i >= 0]
    times, span_s = media.times_s, None
    if method == "lstp":
        span_s = tuple(round(edge, 6) for edge in Span(*choice.span[0].tolist()).to_seconds(times, media.duration_s))
    for stage, value in asked.seconds.items():
        seconds[stage] = seconds.get(stage, 0.0) + value
    scores = None if choice.scores is None else choice.scores[0].double().numpy()
    took = {"frames": "exact" if predictor.reader.how["exact"] else "keyframe"}
    took |= {} if media.flow is None else {"flow_pairs": predictor.reader.flow_pairs}
    took |= {name: value for name, value in how.reading.items() if name in took}
    took["frames"] = _read_as(took["frames"], video, media.numbers)
    used = {"k": k, "num_candidates": len(times), **took, **how.selector.settings}
    num_filled = 0 if choice.num_filled is None else int(choice.num_filled[0])
    return (
        info,
        digest,
        {"settings": used, "num_filled": num_filled} | _told(media.numbers, times, index, scores, span_s),
    )
