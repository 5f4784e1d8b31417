"""Shapes-QA keeps its promises: neither the question, nor evenly spaced frames, nor one still frame gives it away."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from video_files import numbered_video

from lavis_lstp.data.frame_numbers import uniform_centres
from lavis_lstp.data.shapes import scene as shapes_scene
from lavis_lstp.data.shapes import shapes_qa
from lavis_lstp.data.video.reading import read_frames
from lavis_lstp.errors import ConfigError

SMALL = {"train_videos": 3, "val_videos": 2, "test_videos": 2, "train_images": 6, "size": 96}
COLOURED = 60  # largest minus smallest channel; grey pixels stay below it after coding
EVENT_PIXELS = 100  # of 96 x 96; the thinnest shape, a bar, covers about 200


def decode(path: Path) -> np.ndarray:
    """uint8 [T,H,W,3], by PyAV alone, so that our own reader is not part of the proof."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def coloured_pixels(frames: np.ndarray) -> np.ndarray:
    """int64 [T]: pixels of [T,H,W,3] that are plainly not grey."""
    return (frames.max(axis=-1).astype(int) - frames.min(axis=-1) > COLOURED).sum(axis=(1, 2))


def scenes(split: str, count: int):
    """(scene, questions) of the seed 0."""
    for index in range(count):
        rng = shapes_scene.scene_stream(0, split, index)
        scene = shapes_scene.sample_scene(rng)
        yield scene, shapes_scene.sample_questions(rng, scene)


@pytest.fixture(scope="module")
def symbolic() -> dict[str, list]:
    """9,000 scenes, enough to see a bias of two points in any question."""
    return {"train": list(scenes("train", 6000)), "test": list(scenes("test", 3000))}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    shapes_qa.generate(out, workers=2, **SMALL)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- the world


def test_even_frames_are_those_of_even_spacing():
    of_128 = uniform_centres(4, 128)
    read = uniform_centres(64, 128)
    of_64 = [read[i] for i in uniform_centres(4, 64)]
    assert sorted(of_128 + of_64) == list(shapes_scene.EVEN_FRAMES)
    # What is coded as a key frame is one of each pair, the one before, on which the other is built.
    assert sorted(of_64) == list(shapes_qa.KEY_FRAMES)
    assert [i + 1 for i in of_64] == of_128


def test_events_are_apart_distinct_and_inside(symbolic):
    for scene, questions in symbolic["train"][:2000]:
        for names in zip(*((e.motion, e.colour, e.kind) for e in scene.events), strict=True):
            assert len(set(names)) == 4
        for before, after in zip(scene.events, scene.events[1:], strict=False):
            assert after.start - before.end >= shapes_scene.MIN_GAP
        for event in scene.events:
            assert 10 <= event.end - event.start == len(event.poses) <= 14
            assert 0 < event.start and event.end < shapes_scene.NUM_FRAMES
            for even in shapes_scene.EVEN_FRAMES:
                assert not event.start - 2 <= even < event.end + 2
            for x, y, _ in event.poses:
                assert event.radius <= min(x, y) and max(x, y) <= 1 - event.radius
        asks = Counter(q.category.split("-")[1] for q in questions)
        assert asks == {"colour": 3, "kind": 3}


def test_a_question_names_exactly_one_event(symbolic):
    for scene, questions in symbolic["test"][:500]:
        by_span = {event.span_s: event for event in scene.events}
        for question in questions:
            which, asks = question.category.split("-")
            event = by_span[question.span_s]
            assert question.answer == (event.colour if asks == "colour" else event.kind)
            if which in shapes_scene.MOTIONS:
                assert [e for e in scene.events if e.motion == which] == [event]
            else:
                ends = {"first": min, "last": max}
                assert event == ends[which](scene.events, key=lambda e: e.start)
            assert shapes_scene.PHRASES[which] in question.text


def test_motions_go_where_they_say(symbolic):
    seen = set()
    for scene, _ in symbolic["train"][:300]:
        for event in scene.events:
            (x0, y0, a0), (x1, y1, a1) = event.poses[0], event.poses[-1]
            turned = abs((a1 - a0 + 180) % 360 - 180)
            moved = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0}
            seen.add(event.motion)
            if event.motion in moved:
                assert 0.249 < moved[event.motion] < 0.351
                assert turned < 1e-6
            else:
                assert abs(y1 - y0) < 1e-9 and abs(x1 - x0) <= 2 * shapes_scene.SHAKE
                assert (turned > 45) == (event.motion == "turn")
            if event.motion == "shake":
                xs = [x for x, _, _ in event.poses]
                assert max(xs) - min(xs) > shapes_scene.SHAKE
                assert np.diff(np.sign(np.diff(xs))).any()  # it comes back
    assert seen == set(shapes_scene.MOTIONS)


# ---------------------------------------------------------------- the question alone


def lookup_accuracy(train: list, test: list, key) -> float:
    """Accuracy of the most frequent answer of the training scenes for `key(scene, question, place)`."""
    table: dict = defaultdict(Counter)
    for scene, questions in train:
        for place, question in enumerate(questions):
            table[key(scene, question, place)][question.answer] += 1
    right = total = 0
    for scene, questions in test:
        for place, question in enumerate(questions):
            answers = table.get(key(scene, question, place))
            right += bool(answers) and answers.most_common(1)[0][0] == question.answer
            total += 1
    return right / total


def four_sigma(chance: float, count: int) -> float:
    return 4 * math.sqrt(chance * (1 - chance) / count)


@pytest.mark.parametrize(
    "key",
    [
        lambda scene, question, place: question.text,
        lambda scene, question, place: (question.text, place),
        lambda scene, question, place: (question.text, question.span_s[0] // 3.2),
        lambda scene, question, place: (question.category[-4:], tuple(sorted(s.kind for s in scene.distractors))),
    ],
    ids=["question", "question and its place", "question and rough time", "sort and still shapes"],
)
def test_no_lookup_beats_the_documented_chance(symbolic, key):
    chance = float(shapes_scene.OVERALL_CHANCE)
    accuracy = lookup_accuracy(symbolic["train"], symbolic["test"], key)
    assert abs(accuracy - chance) < four_sigma(chance, 6 * 3000)


def test_the_lookup_would_notice_a_leak(symbolic):
    """The control: told the colour of the first event, the same lookup gains on the one question about it."""

    def leak(scene, question, place):
        return (question.text, scene.events[0].colour if question.category == "first-colour" else None)

    chance = float(shapes_scene.OVERALL_CHANCE)
    assert lookup_accuracy(symbolic["train"], symbolic["test"], leak) > chance + 4 * four_sigma(chance, 6 * 3000)


def test_answers_are_uniform_for_every_question(symbolic):
    answers: dict = defaultdict(Counter)
    for _, questions in symbolic["train"] + symbolic["test"]:
        for question in questions:
            answers[question.text][question.answer] += 1
            answers["all that ask for a " + question.category.split("-")[1]][question.answer] += 1
    assert len(answers) == 16 + 2  # (six motions, first, last) x (colour, kind)
    for text, counts in answers.items():
        legal = shapes_scene.COLOURS if "colour" in text else shapes_scene.KINDS
        assert set(counts) == set(legal)
        total, share = counts.total(), 1 / len(legal)
        assert max(counts.values()) / total < share + four_sigma(share, total)


def test_chance_rates_of_the_manifest(made):
    chance = json.loads((made / "manifest.json").read_text())["chance"]
    assert (chance["colour"], chance["kind"]) == (1 / 8, pytest.approx(1 / 6, abs=1e-6))
    assert chance["overall"] == pytest.approx(7 / 48, abs=1e-6)


# ---------------------------------------------------------------- one still frame


def poses_and_motions(pairs: list, stream: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [N,F] of a random frame of each event, with `steps` also of the change of place since
    the frame before; index of the motion [N]."""
    rng = random.Random(stream)
    rows, motions = [], []
    for scene, _ in pairs:
        for event in scene.events:
            i = rng.randrange(len(event.poses))  # leaving out the last would tell right from left
            x, y, angle_deg = event.poses[i]
            row = [x - 0.5, y - 0.5, math.sin(math.radians(angle_deg)), event.radius]
            if steps:
                j = max(i, 1)
                row += [10 * (b - a) for a, b in zip(event.poses[j - 1][:2], event.poses[j][:2], strict=True)]
            rows.append(row)
            motions.append(shapes_scene.MOTIONS.index(event.motion))
    rows = np.array(rows)
    squares = np.stack([rows[:, i] * rows[:, j] for i in range(rows.shape[1]) for j in range(i + 1)], axis=1)
    return np.concatenate([np.ones((len(rows), 1)), rows, squares], axis=1), np.array(motions)


def probe_accuracy(symbolic, steps: int, motions=range(6)) -> tuple[float, int]:
    """Quadratic least-squares classifier of the motion: (accuracy, number of test events)."""
    (x, y), (x_test, y_test) = (poses_and_motions(symbolic[split], split, steps) for split in ("train", "test"))
    keep, keep_test = np.isin(y, motions), np.isin(y_test, motions)
    weights, *_ = np.linalg.lstsq(x[keep], np.eye(6)[y[keep]], rcond=None)
    guess = (x_test[keep_test] @ weights).argmax(axis=1)
    return float((guess == y_test[keep_test]).mean()), int(keep_test.sum())


def test_one_still_frame_does_not_tell_the_motion(symbolic):
    accuracy, count = probe_accuracy(symbolic, steps=0, motions=range(5))
    assert accuracy < 1 / 5 + four_sigma(1 / 5, count)
    # Shaking widens the place by +-5 % of the width, worth at most two points.
    accuracy, count = probe_accuracy(symbolic, steps=0)
    assert accuracy < 1 / 6 + four_sigma(1 / 6, count) + 0.02


def test_the_probe_would_notice_motion(symbolic):
    assert probe_accuracy(symbolic, steps=1)[0] > 0.5


# ---------------------------------------------------------------- pixels


def test_even_frames_hold_nothing_of_the_events(tmp_path):
    """Drawn, they are the background; decoded, they are bit-equal to those of a video in which nothing happens."""
    even = list(shapes_scene.EVEN_FRAMES)
    for index in range(4):
        scene, _, _ = shapes_qa.video_entries(shapes_qa.Parameters(), "test", index)
        drawn = shapes_qa.draw_scene(scene, 96)
        still = np.repeat(shapes_qa.draw_background(scene.texture_seed, scene.distractors, 96)[None], 128, axis=0)
        assert np.array_equal(drawn[even], still[even])
        assert not np.array_equal(drawn, still)
        shapes_qa.write_video(tmp_path / "events.mp4", drawn)
        shapes_qa.write_video(tmp_path / "still.mp4", still)
        events, nothing = decode(tmp_path / "events.mp4"), decode(tmp_path / "still.mp4")
        assert np.array_equal(events[even], nothing[even])
        assert coloured_pixels(events[even]).max() == 0


def test_gold_spans_are_where_the_colour_is(made):
    rows = json.loads((made / "test.json").read_text()) + json.loads((made / "val.json").read_text())
    spans: dict[str, set] = defaultdict(set)
    for row in rows:
        spans[row["video"]].add(tuple(row["span_s"]))
    assert len(spans) == 4
    for video, times in spans.items():
        pixels = coloured_pixels(decode(made / video))
        assert len(pixels) == 128 and len(times) == 4
        inside = np.zeros(128, dtype=bool)
        for start_s, end_s in times:
            inside[round(start_s * 10) : round(end_s * 10)] = True
        assert pixels[inside].min() > EVENT_PIXELS
        assert pixels[~inside].max() == 0


def test_pictures_show_at_most_one_coloured_shape_and_ask_about_it(made):
    names = list(shapes_scene.COLOURS)
    rgb = np.array(list(shapes_scene.COLOURS.values()), dtype=float)
    rgb /= np.linalg.norm(rgb, axis=1, keepdims=True)
    seen = set()
    for index in range(120):
        shapes, texture_seed, rows = shapes_qa.image_entries(0, index)
        picture = shapes_qa.draw_background(texture_seed, shapes, 96)
        saturated = picture[picture.max(-1).astype(int) - picture.min(-1) > COLOURED].astype(float)
        words = {word for row in rows for word in row["answer"].split()}
        seen |= words
        if words == {"none"}:
            assert len(saturated) == 0
            continue
        assert "none" not in words and len(saturated) > EVENT_PIXELS
        assert words & set(shapes_scene.KINDS) <= {shapes[-1].kind}
        hue = saturated.mean(axis=0) / np.linalg.norm(saturated.mean(axis=0))
        assert words & set(names) <= {names[(rgb @ hue).argmax()]}
    assert seen >= {*names, *shapes_scene.KINDS}

    rows = json.loads((made / "train_images.json").read_text())
    assert len(rows) == 2 * SMALL["train_images"]
    for row in rows:
        assert "span_s" not in row and "video" not in row
        assert np.asarray(Image.open(made / row["image"])).shape == (96, 96, 3)


# ---------------------------------------------------------------- files


def test_same_seed_same_bytes_whatever_the_workers(made, tmp_path):
    shapes_qa.generate(tmp_path / "again", workers=1, **SMALL)
    assert contents(tmp_path / "again") == contents(made)
    shapes_qa.generate(
        tmp_path / "other", workers=1, seed=1, train_videos=1, val_videos=0, test_videos=0, train_images=0
    )
    other = contents(tmp_path / "other")
    assert other["videos/train/train-00000.mp4"] != contents(made)["videos/train/train-00000.mp4"]


def test_size_of_a_split_does_not_change_its_videos(made, tmp_path):
    shapes_qa.generate(tmp_path, workers=1, **{**SMALL, "train_videos": 1, "train_images": 1})
    bigger = contents(made)
    fewer = {name: data for name, data in contents(tmp_path).items() if not name.endswith(".json")}
    assert len(fewer) == 1 + 2 + 2 + 1
    assert all(bigger[name] == data for name, data in fewer.items())


def test_splits_share_no_video(made):
    videos = [data for name, data in contents(made).items() if name.endswith(".mp4")]
    assert len(videos) == len(set(videos)) == 7
    ids = {s: {r["video_id"] for r in json.loads((made / f"{s}.json").read_text())} for s in shapes_qa.SPLITS}
    assert [len(ids[s]) for s in shapes_qa.SPLITS] == [3, 2, 2]
    assert not ids["train"] & ids["val"] and not ids["train"] & ids["test"] and not ids["val"] & ids["test"]


def test_an_interrupted_call_is_continued(made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real, calls = shapes_qa.write_video, []

    def dies(path, frames):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(path, frames)

    monkeypatch.setattr(shapes_qa, "write_video", dies)
    with pytest.raises(KeyboardInterrupt):
        shapes_qa.generate(out, workers=1, **SMALL)
    assert not (out / "manifest.json").exists()
    with pytest.raises(ConfigError, match="size: there 96, wanted 64"):
        shapes_qa.generate(out, workers=1, **{**SMALL, "size": 64})
    calls.extend([None] * 10)
    before = len(calls)
    shapes_qa.generate(out, workers=1, **SMALL)
    assert len(calls) - before == 7 - 3  # the finished three were kept
    assert contents(out) == contents(made)


def test_a_complete_folder_is_left_alone_and_another_seed_refused(made, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    shapes_qa.generate(out, workers=1, **SMALL)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert shapes_qa.main([str(out), "--seed", "5"]) == 2
    error = capsys.readouterr().err
    assert "seed: there 0, wanted 5" in error and error.count("\n") == 1
    with pytest.raises(ConfigError, match="even number"):
        shapes_qa.generate(tmp_path / "odd", size=65)


# ---------------------------------------------------------------- needles


NEEDLES = {"train_videos": 1, "val_videos": 1, "test_videos": 1, "train_images": 3, "size": 32}
NEEDLES |= {"window_s": 49, "haystack_s": 151}


@pytest.fixture(scope="module")
def needles(tmp_path_factory) -> tuple[Path, Path]:
    """A film of three seconds, and needles in it."""
    root = tmp_path_factory.mktemp("needles")
    film = numbered_video(root / "film.mp4", 75, width=64, height=32)
    shapes_qa.generate(root / "out", workers=1, film=str(film), **NEEDLES)
    return film, root / "out"


def test_needles_are_seen_in_their_spans_and_the_film_everywhere_else(needles):
    film, out = needles
    frames = decode(out / "videos/test/test-00000.mp4")
    assert len(frames) == 1510
    rows = json.loads((out / "test.json").read_text())
    pixels = read_frames(film, times_s=np.arange(30) / 10, size=32, decode_size=32).frames
    scene = shapes_qa.video_entries(shapes_qa.Parameters(film=str(film), **NEEDLES), "test", 0)[0]
    plain = np.stack(list(shapes_qa.over_film(pixels, shapes_scene.Scene((), (), scene.texture_seed), 1510)))
    differs = np.abs(frames.astype(int) - plain).max(axis=-1) > 40  # more than coding does
    inside = np.zeros(1510, dtype=bool)
    for row in rows:
        start, end = (round(10 * edge) for edge in row["span_s"])
        inside[start:end] = True
    assert (differs.sum(axis=(1, 2)) > 20)[inside].mean() > 0.98 and differs[~inside].sum(axis=(1, 2)).max() < 5
    assert Counter(row["category"] for row in rows) == {"2 s": 4, "10 s": 4, "60 s": 4}
    assert all(f"{row['span_s'][1] - row['span_s'][0]:.0f} s" == row["category"] for row in rows)
    assert len({row["question"] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("seconds", "lengths"), [(64, shapes_scene.WINDOW_EVENTS_S), (192, shapes_scene.HAYSTACK_EVENTS_S)]
)
def test_long_windows_have_the_events_of_a_haystack(needles, seconds, lengths):
    parameters = shapes_qa.Parameters(film=str(needles[0]), window_s=seconds)
    scene, num_frames, _ = shapes_qa.video_entries(parameters, "train", 0)
    assert num_frames == 10 * seconds
    assert sorted((event.end - event.start) // 10 for event in scene.events) == sorted(lengths)


def test_needles_lie_apart_anywhere_and_move_at_every_second():
    starts = []
    for index in range(200):
        rng = shapes_scene.scene_stream(0, "test", index)
        scene = shapes_scene.sample_needles(rng, 600, shapes_scene.HAYSTACK_EVENTS_S)
        for names in zip(*((e.motion, e.colour, e.kind) for e in scene.events), strict=True):
            assert len(set(names)) == 6
        edges = [0, *(edge for event in scene.events for edge in (event.start, event.end)), 6000]
        assert all(after - before >= 10 for before, after in zip(edges[::2], edges[1::2], strict=True))
        assert all(len(event.poses) == event.end - event.start for event in scene.events)
        starts += [event.start for event in scene.events if event.end - event.start == 20]
    counts, _ = np.histogram(starts, bins=4, range=(0, 6000))
    assert counts.min() > 60  # of 400, over the whole video
    with pytest.raises(ConfigError, match="haystack_s must be at least 151, got 150"):
        shapes_qa.Parameters(haystack_s=150)


def test_needles_are_the_same_wherever_the_film_lies_and_another_film_is_refused(needles, tmp_path):
    film, out = needles
    moved, again = tmp_path / "elsewhere.mp4", tmp_path / "again"
    shutil.copy(film, moved)
    shapes_qa.generate(again, workers=1, film=str(moved), **NEEDLES)
    assert contents(again) == contents(out) and not (again / "film.npy").exists()
    other = numbered_video(tmp_path / "other.mp4", 30, width=64, height=32)
    with pytest.raises(ConfigError, match="film: there [0-9a-f]+, wanted [0-9a-f]+"):
        shapes_qa.generate(again, workers=1, film=str(other), **NEEDLES)
    with pytest.raises(ConfigError, match="no such film: nowhere.mp4"):
        shapes_qa.generate(again, film="nowhere.mp4")


def test_pictures_that_teach_needles_have_the_film_behind(needles):
    _, out = needles
    rows = json.loads((out / "train_images.json").read_text())
    coloured = {row["image"] for row in rows if row["answer"] != "none"}
    assert coloured
    for name in coloured:
        picture = np.asarray(Image.open(out / name))
        assert picture.shape == (32, 32, 3) and coloured_pixels(picture[None])[0] > 10
