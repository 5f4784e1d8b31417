"""Shapes-QA: the embedded data set of short videos with questions that need one particular moment.

    python -m lavis_lstp.data.shapes.shapes_qa OUT [--seed 0 --train-videos 400 --val-videos 40 --test-videos 100
                                             --train-images 3000 --size 96 --workers 2]

In: a seed and sizes. Out, in the folder OUT:

    videos/{train,val,test}/*.mp4       H.264, 128 frames at 10 fps
    {train,val,test}.json               questions, gold answers and gold spans (see `qa_dataset`)
    images/train/*.jpg, train_images.json   pictures of one coloured shape each, to teach a base answerer what
                                        colours and shapes look like, as BLIP-2 is pre-trained on pictures
    manifest.json                       written last: parameters, SHA-256 of the annotations, chance rates

What the videos show, and why neither the question alone nor evenly spaced frames can answer it, is told in
`shapes_scene`. Every video and picture has its own random stream, named by (seed, split, index): the splits
share none, and the number of workers changes nothing.

Every file appears under its name only when complete, and the manifest last. A second call with the same
parameters does nothing, an interrupted one is continued, and one with other parameters is an error.

Encoding is a part of the construction. A codec can carry a shadow of a past event into later frames, so
the frames that even spacing shows are key frames (`EVEN_FRAMES`; one of each neighbouring pair, the other
follows from it), the quantiser is constant and no frame refers to a later one: those frames decode to
the same bytes whether the events were in the video or not.

With `--film FILE` events of 2, 10 and 60 s are drawn over the footage of a film instead, which has motion, cuts and
colours of its own: test videos are haystacks of ten minutes, train and val videos windows of a minute, and each begins
somewhere in the film, which is repeated from its start where it ends. All splits share the footage, none the events.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lavis_lstp.data.shapes import scene as world
from lavis_lstp.data.video.reading import probe, read_frames
from lavis_lstp.errors import ConfigError, run_command
from lavis_lstp.files import sha256_file, strict_json, whole_file, write_json

VERSION = 1
FORMAT = "lavis_lstp.shapes_qa"
SPLITS = ("train", "val", "test")
SUPERSAMPLE = 4
SHADE = 0.62  # brightness of a shape's one half, so that turning is visible in all kinds, circles included
QUANTISER = 18
MOST_FILM_S = 1800
"""Seconds of a film that are used, from its start on; its pictures are held in memory once."""
KEY_FRAMES = world.EVEN_FRAMES[::2]

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- drawing


@lru_cache
def outline(kind: str) -> np.ndarray:
    """Corners [N,2] of a kind of shape at angle 0, within the unit circle, y down."""

    def ring(n: int, radius: float = 1.0, turn: float = 0.0) -> np.ndarray:
        angle = 2 * np.pi * (np.arange(n) / n + turn) - np.pi / 2
        return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)

    if kind == "circle":
        return ring(40, 0.85)
    if kind == "square":
        return ring(4, turn=1 / 8)
    if kind == "triangle":
        return ring(3)
    if kind == "star":
        return np.stack([ring(5), ring(5, 0.42, turn=1 / 10)], axis=1).reshape(10, 2)
    if kind == "cross":
        a, b = 0.94, 0.32
        quarter = [(-b, -a), (b, -a), (b, -b)]
        return np.array([p for q in range(4) for p in (_rotate(np.array(quarter), 90.0 * q))])
    assert kind == "bar", kind
    return np.array([(-0.3, -0.95), (0.3, -0.95), (0.3, 0.95), (-0.3, 0.95)])


def _rotate(points: np.ndarray, angle_deg: float) -> np.ndarray:
    angle = np.deg2rad(angle_deg)
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


def draw_shape(picture: np.ndarray, shape: world.Shape) -> None:
    """Draws on `picture` (uint8 [size,size,3], in place): edges antialiased, one half darker than the other."""
    size = picture.shape[0]
    reach = int(shape.radius * size) + 2
    left, top = int(shape.x * size) - reach, int(shape.y * size) - reach
    side = 2 * reach + 1
    offset = np.array([shape.x * size - left, shape.y * size - top])

    def coverage(points: np.ndarray) -> np.ndarray:
        """[side,side,1] in 0..1."""
        corners = _rotate(points, shape.angle_deg) * shape.radius * size + offset
        canvas = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE))
        ImageDraw.Draw(canvas).polygon([tuple(p) for p in corners * SUPERSAMPLE - 0.5], fill=255)
        return np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32)[..., None] / 255

    alpha = coverage(outline(shape.kind))
    dark = coverage(np.array([(0.0, -2.0), (2.0, -2.0), (2.0, 2.0), (0.0, 2.0)]))
    colour = np.array(shape.rgb, dtype=np.float32) * (1 - (1 - SHADE) * dark)
    # The part of the patch that lies in the picture.
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, size), min(top + side, size)
    inside = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    under = picture[y0:y1, x0:x1].astype(np.float32)
    mixed = under + alpha[inside] * (colour[inside] - under)
    picture[y0:y1, x0:x1] = np.rint(mixed).astype(np.uint8)


def draw_background(texture_seed: int, shapes: Iterable[world.Shape], size: int) -> np.ndarray:
    """uint8 [size,size,3]: a mild grey texture, which gives optical flow something to hold on to, and `shapes`."""
    rng = np.random.default_rng(texture_seed)
    grey = np.full((size, size), 125.0)
    for cells, strength in ((6, 10.0), (16, 8.0), (48, 6.0)):
        noise = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        grey += strength * np.asarray(noise.resize((size, size), Image.Resampling.BILINEAR))
    picture = np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)
    for shape in shapes:
        draw_shape(picture, shape)
    return picture


def draw_scene(scene: world.Scene, size: int) -> np.ndarray:
    """uint8 [128,size,size,3], RGB: the frames as they go into the encoder."""
    background = draw_background(scene.texture_seed, scene.distractors, size)
    frames = np.repeat(background[None], world.NUM_FRAMES, axis=0)
    for event in scene.events:
        for i in range(event.start, event.end):
            draw_shape(frames[i], event.shape_at(i))
    return frames


def over_film(film: np.ndarray, scene: world.Scene, num_frames: int) -> Iterator[np.ndarray]:
    """Frames uint8 [S,S,3], RGB: a stretch of the film, mirrored or not, and the events over it.

    Args:
        film: uint8 [N,3,S,S], its pictures at 10 a second.
    """
    shown = {i: event.shape_at(i) for event in scene.events for i in range(event.start, event.end)}
    for i in range(num_frames):
        picture = _still_of(film, scene.texture_seed, i)
        if i in shown:
            draw_shape(picture, shown[i])
        yield picture


def _still_of(film: np.ndarray, seed: int, i: int = 0) -> np.ndarray:
    picture = film[(seed // 2 + i) % len(film)].transpose(1, 2, 0)
    return np.array(picture[:, ::-1] if seed % 2 else picture)


# ---------------------------------------------------------------- files


def write_video(path: Path, frames: Iterable[np.ndarray], key_frames: Sequence[int] = KEY_FRAMES) -> None:
    """Encodes uint8 [H,W,3] RGB to H.264 at 10 fps.

    Args:
        key_frames: these and the first alone; none = where the encoder finds cuts.
    """
    import av
    from av.video.frame import PictureType

    keys = f"scenecut=0:keyint={world.NUM_FRAMES}:forced-idr=1:" if key_frames else ""
    options = {
        "preset": "veryfast",
        "qp": str(QUANTISER),
        "x264-params": f"bframes=0:{keys}ref=1:weightp=0",
        "threads": "1",
    }

    with whole_file(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=world.FPS, options=options)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, world.FPS)
        for i, pixels in enumerate(frames):
            if i == 0:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i
            if i in key_frames:
                frame.pict_type = PictureType.I
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _make_video(job: tuple[Path, world.Scene, int, Path | None, int]) -> None:
    path, scene, size, film, num_frames = job
    if path.exists():
        return
    if film is None:
        write_video(path, draw_scene(scene, size))
    else:
        write_video(path, over_film(np.lib.format.open_memmap(film, mode="r"), scene, num_frames), key_frames=())


def _make_image(job: tuple[Path, tuple[world.Shape, ...], int, int, Path | None]) -> None:
    path, shapes, texture_seed, size, film = job
    if path.exists():
        return
    if film is None:
        picture = draw_background(texture_seed, shapes, size)
    else:
        picture = _still_of(np.lib.format.open_memmap(film, mode="r"), texture_seed)
        for shape in shapes:
            if shape.rgb in world.COLOURS.values():
                draw_shape(picture, shape)
    with whole_file(path) as partial:
        Image.fromarray(picture).save(partial, format="JPEG", quality=92)


def _read_film(path: Path, film: str, size: int) -> None:
    """Writes the film's pictures, 10 a second, uint8 [N,3,size,size], for the processes that draw over them."""
    if path.exists():
        return
    times_s = np.arange(0, min(probe(film).duration_s, MOST_FILM_S), 1 / world.FPS)
    video = read_frames(film, times_s=times_s, size=size, decode_size=size, threads=2)
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.save(file, video.frames, allow_pickle=False)


def _run(function: Callable[[Any], None], jobs: list, workers: int) -> None:
    if workers <= 1 or len(jobs) < 2:
        for job in jobs:
            function(job)
        return
    # spawn: a forked child would inherit whatever threads the caller's libraries have started.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(function, jobs, chunksize=8):
            pass


# ---------------------------------------------------------------- the data set


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """All that decides the content of the data set; the last three count with a film alone."""

    seed: int = 0
    train_videos: int = 400
    val_videos: int = 40
    test_videos: int = 100
    train_images: int = 3000
    size: int = 96
    film: str | None = None
    window_s: int = 64
    haystack_s: int = 600

    def __post_init__(self) -> None:
        if self.size < 32 or self.size % 2:
            raise ConfigError(f"Shapes-QA: size must be an even number of at least 32 pixels, got {self.size}")
        for name in ("train_videos", "val_videos", "test_videos", "train_images"):
            if getattr(self, name) < 0:
                raise ConfigError(f"Shapes-QA: {name} must not be negative, got {getattr(self, name)}")
        if self.film and not Path(self.film).is_file():
            raise ConfigError(f"Shapes-QA: no such film: {self.film}")
        for name, events_s in (("window_s", world.WINDOW_EVENTS_S), ("haystack_s", world.HAYSTACK_EVENTS_S)):
            least = sum(events_s) + len(events_s) + 1
            if getattr(self, name) < least:
                raise ConfigError(f"Shapes-QA: {name} must be at least {least}, got {getattr(self, name)}")

    def as_dict(self) -> dict[str, Any]:
        """Return what a manifest records; a film is told by its SHA-256, wherever it lies."""
        of_films = {"film", "window_s", "haystack_s"}
        kept = vars(self) if self.film else {name: value for name, value in vars(self).items() if name not in of_films}
        return {"format": FORMAT, "version": VERSION, **kept, **({"film": sha256_file(self.film)} if self.film else {})}


def video_entries(parameters: Parameters, split: str, index: int) -> tuple[world.Scene, int, list[dict[str, Any]]]:
    """The scene of one video, its number of frames, and its annotation entries."""
    rng = world.scene_stream(parameters.seed, split, index)
    if parameters.film:
        seconds = parameters.haystack_s if split == "test" else parameters.window_s
        scene, num_frames = world.sample_needles(rng, seconds, world.needle_lengths(seconds)), world.FPS * seconds
        questions = world.needle_questions(scene)
    else:
        scene, num_frames = world.sample_scene(rng), world.NUM_FRAMES
        questions = world.sample_questions(rng, scene)
    video_id = f"{split}-{index:05d}"
    entries = [
        {
            "question_id": f"{video_id}-q{n}",
            "video_id": video_id,
            "video": f"videos/{split}/{video_id}.mp4",
            "question": q.text,
            "answer": q.answer,
            "category": q.category,
            "span_s": list(q.span_s),
        }
        for n, q in enumerate(questions)
    ]
    return scene, num_frames, entries


def image_entries(seed: int, index: int) -> tuple[tuple[world.Shape, ...], int, list[dict[str, Any]]]:
    """The shapes and the texture's seed of one picture, and its annotation entries."""
    shapes, texture_seed, asked = world.sample_still(world.scene_stream(seed, "train-images", index))
    image_id = f"image-{index:05d}"
    entries = [
        {
            "question_id": f"{image_id}-q{n}",
            "video_id": image_id,
            "image": f"images/train/{image_id}.jpg",
            "question": question,
            "answer": answer,
            "category": category,
        }
        for n, (question, answer, category) in enumerate(asked)
    ]
    return shapes, texture_seed, entries


def _chance(film: str | None) -> dict[str, Any]:
    """What the manifest says about the best guess without the right frames."""
    rates = {
        "overall": round(float(world.OVERALL_CHANCE), 6),
        **{sort: round(float(rate), 6) for sort, rate in world.CHANCE.items()},
    }
    if film:
        return {**rates, "meaning": "best possible accuracy from the question alone"}
    return {
        **rates,
        "meaning": "best possible accuracy from the question alone, and from the evenly spaced frames, in which "
        "no event is visible by construction; a guess that moves randomly chosen frames see is not covered",
        "evenly_spaced_frames": list(world.EVEN_FRAMES),
    }


def _check_parameters(out: Path, parameters: Parameters) -> dict[str, Any] | None:
    """The finished data set's manifest, None where there is work to do.

    Raises:
        ConfigError: OUT holds, complete or not, a data set of other parameters.
    """
    wanted = parameters.as_dict()
    for name in ("manifest.json", "incomplete.json"):
        path = out / name
        if not path.exists():
            continue
        try:
            found = strict_json(path.read_text(encoding="utf-8-sig"))
            there = found["parameters"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a Shapes-QA manifest ({error}); use another folder") from error
        if there != wanted:
            keys = sorted(k for k in wanted.keys() | there.keys() if wanted.get(k) != there.get(k))
            differ = ", ".join(f"{k}: there {there.get(k)}, wanted {wanted.get(k)}" for k in keys)
            raise ConfigError(f"{out} holds Shapes-QA with other parameters ({differ}); use another folder")
        return found if name == "manifest.json" else None
    return None


def generate(out: str | Path, *, workers: int = 2, **parameters: Any) -> dict[str, Any]:
    """Writes the data set to the folder `out`, as the module's docstring tells; returns its manifest.

    Args:
        workers: processes that draw and encode; the result does not depend on it.
        parameters: fields of `Parameters`.

    Raises:
        ConfigError: a parameter is out of range, or `out` holds a data set of other parameters.
    """
    out = Path(out)
    wanted = Parameters(**parameters)
    done = _check_parameters(out, wanted)
    if done:
        logger.info("Shapes-QA is complete in %s", out)
        return done
    write_json(out / "incomplete.json", {"parameters": wanted.as_dict()}, indent=1)

    film = out / "film.npy" if wanted.film else None
    if film:
        _read_film(film, wanted.film, wanted.size)
    annotations: dict[str, list[dict[str, Any]]] = {}
    videos = []
    for split in SPLITS:
        annotations[split] = []
        for index in range(getattr(wanted, f"{split}_videos")):
            scene, num_frames, entries = video_entries(wanted, split, index)
            annotations[split] += entries
            videos.append((out / entries[0]["video"], scene, wanted.size, film, num_frames))
    annotations["train_images"] = []
    images = []
    for index in range(wanted.train_images):
        shapes, texture_seed, entries = image_entries(wanted.seed, index)
        annotations["train_images"] += entries
        images.append((out / entries[0]["image"], shapes, texture_seed, wanted.size, film))

    _run(_make_video, videos, workers)
    _run(_make_image, images, workers)
    for name, entries in annotations.items():
        write_json(out / f"{name}.json", entries, indent=1)
    manifest = {
        "parameters": wanted.as_dict(),
        "sha256": {f"{n}.json": sha256_file(out / f"{n}.json") for n in annotations},
        "questions": {name: len(entries) for name, entries in annotations.items()},
        "chance": _chance(wanted.film),
    }
    write_json(out / "manifest.json", manifest, indent=1)
    for name in ("incomplete.json", "film.npy"):
        (out / name).unlink(missing_ok=True)  # another process may have finished the same folder
    return manifest


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lavis_lstp.data.shapes.shapes_qa", description="Generate the Shapes-QA data set."
    )
    parser.add_argument("out", metavar="OUT", help="folder to write to")
    for name, default in vars(Parameters()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=str if name == "film" else int, default=default)
    parser.add_argument("--workers", type=int, default=2)
    chosen = vars(parser.parse_args(arguments))
    out = chosen.pop("out")

    def work() -> None:
        manifest = generate(out, **chosen)
        counts = ", ".join(f"{name} {n}" for name, n in manifest["questions"].items())
        print(f"Shapes-QA in {out}: questions: {counts}; chance {manifest['chance']['overall']:.1%}")

    return run_command(work)


if __name__ == "__main__":
    raise SystemExit(main())
