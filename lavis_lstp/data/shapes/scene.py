"""What happens in a Shapes-QA video, and what can be asked about it: symbols only, no pixels.

In: a random stream, named by a string (`scene_stream`). Out: `Scene` (what `shapes_qa` draws) and a list of
`Question`. Kept apart from drawing so that 20,000 scenes cost seconds and the claims below can be tested on
that many.

A video has 128 frames at 10 per second. Two to four grey shapes lie still in it from the first frame to the
last. Four times, for 1.0 to 1.4 s and never two at once, a coloured shape enters, moves in one of six ways and
is gone again. The four have distinct motions, colours and kinds, so that a question names exactly one of them.

Three properties are built in, each proven in tests/data/test_shapes_qa.py:

* **The question alone does not help.** Motion, colour, kind, time and place are drawn independently and
  uniformly, so each question has its answers equally likely: 1/8 for a colour, 1/6 for a kind, and 7/48
  (14.6 %) over all, half of the questions being of either sort.
* **Evenly spaced frames do not help.** No coloured shape is visible in, or within two frames of, the frames
  that even spacing shows at K = 4 (`EVEN_FRAMES`), be the four taken from all 128 frames or from 64 evenly
  spaced ones. That is by construction: the data set is a test of looking at the right time, and even spacing
  is given the worst case, where its accuracy is the question-only chance. `random` frames are the baseline
  without such a construction: each hits some event with probability of about 0.37.
* **One still frame of an event does not tell the motion.** At a random moment of an event the place and the
  angle of the shape have the same distribution for all motions (shaking adds +-5 % of the width to it), so
  only change over time tells which way something moves.

`sample_needles` makes the other kind of scene, for the footage of a film: a few events of 2 to 60 s in minutes, each
repeating its motion, at times drawn without regard to any frame. Evenly spaced frames meet an event of L seconds in S
with a chance of about K L / S, and the question alone still says nothing.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from fractions import Fraction

NUM_FRAMES = 128
FPS = 10
EVENTS = 4
EVENT_FRAMES = (10, 14)  # shortest and longest, both possible
MIN_GAP = 3  # frames without any coloured shape between two events
EVEN_FRAMES = (14, 15, 46, 47, 78, 79, 110, 111)  # uniform_centres(4, 128), and (4, 64) of (64, 128)
EVEN_MARGIN = 2  # frames before and after each of those which are free of events, too

HAYSTACK_EVENTS_S = (2, 2, 10, 10, 60, 60)
WINDOW_EVENTS_S = (2, 2, 10, 30)
CYCLE = 12  # frames after which the motion of a needle begins again, at another place

MOTIONS = ("left", "right", "up", "down", "turn", "shake")
KINDS = ("circle", "square", "triangle", "star", "cross", "bar")
COLOURS = {  # sRGB, 0..255
    "red": (225, 30, 35),
    "green": (25, 150, 45),
    "blue": (35, 60, 225),
    "yellow": (250, 230, 40),
    "purple": (130, 35, 185),
    "orange": (250, 130, 15),
    "cyan": (40, 215, 225),
    "pink": (255, 130, 195),
}
PHRASES = {  # as a question says it
    "left": "moves left",
    "right": "moves right",
    "up": "moves up",
    "down": "moves down",
    "turn": "turns",
    "shake": "shakes",
    "first": "moved first",
    "last": "moved last",
}
CHANCE = {"colour": Fraction(1, len(COLOURS)), "kind": Fraction(1, len(KINDS))}
"""Accuracy of the best guess from the question alone, for questions that ask for a colour and for a kind."""
OVERALL_CHANCE = sum(CHANCE.values()) / len(CHANCE)  # each video asks three of either sort

RADIUS = (0.155, 0.175)  # half of a coloured shape's extent, as a share of the width: 20 to 22 px of 64
GREY_RADIUS = (0.10, 0.13)  # of a distractor
TRAVEL = (0.25, 0.35)  # path length of a shape that moves left, right, up or down, share of the width
TURN_DEG = (50.0, 60.0)
TILT_DEG = 10.0  # the middle of a shape's angles lies within +-TILT_DEG of upright
SHAKE = 0.05  # amplitude, share of the width
SHAKE_PERIOD = 6  # frames; of 64 evenly spaced frames three fall into it, so that none of its phases hides it
MIDDLE = (0.40, 0.60)  # of paths: radius, half of the longest travel and the shaking stay inside the picture


@dataclass(frozen=True)
class Shape:
    """One shape at one moment; lengths are shares of the picture's width, the angle is in degrees."""

    kind: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    radius: float
    angle_deg: float


@dataclass(frozen=True)
class Event:
    """A coloured shape in frames [start, end): `poses[i]` is (x, y, angle_deg) in frame start + i."""

    motion: str
    colour: str
    kind: str
    start: int
    end: int
    radius: float
    poses: tuple[tuple[float, float, float], ...]

    @property
    def span_s(self) -> tuple[float, float]:
        """When it is visible, [start, end) in seconds."""
        return self.start / FPS, self.end / FPS

    def shape_at(self, frame: int) -> Shape | None:
        if not self.start <= frame < self.end:
            return None
        x, y, angle_deg = self.poses[frame - self.start]
        return Shape(self.kind, COLOURS[self.colour], x, y, self.radius, angle_deg)


@dataclass(frozen=True)
class Scene:
    """A whole video: events by time, still grey shapes, and the seed of the background's texture."""

    events: tuple[Event, ...]
    distractors: tuple[Shape, ...]
    texture_seed: int


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    category: str  # "<motion | first | last>-<colour | kind>"
    span_s: tuple[float, float]


def scene_stream(seed: int, split: str, index: int) -> random.Random:
    """The random stream of one video or picture: nothing but these three decides what is in it."""
    return random.Random(f"shapes-qa/{seed}/{split}/{index}")


def event_starts(length: int) -> list[int]:
    """First frames at which an event of that length meets no evenly spaced frame nor either end of the video."""
    taken = {f + d for f in EVEN_FRAMES for d in range(-EVEN_MARGIN, EVEN_MARGIN + 1)}
    return [s for s in range(1, NUM_FRAMES - length) if taken.isdisjoint(range(s, s + length))]


_STARTS = {n: event_starts(n) for n in range(EVENT_FRAMES[0], EVENT_FRAMES[1] + 1)}


def _sample_times(rng: random.Random) -> list[tuple[int, int]]:
    """[start, end) of the events, ascending; an arrangement that breaks MIN_GAP is drawn anew as a whole."""
    while True:
        times = []
        for _ in range(EVENTS):
            length = rng.randint(*EVENT_FRAMES)
            start = rng.choice(_STARTS[length])
            times.append((start, start + length))
        times.sort()
        if all(b[0] - a[1] >= MIN_GAP for a, b in zip(times, times[1:], strict=False)):
            return times


def _sample_poses(rng: random.Random, motion: str, length: int) -> tuple[tuple[float, float, float], ...]:
    """(x, y, angle_deg) per frame.

    Each coordinate is a random middle plus `travel * (phase - 1/2)`. Along the axis of the motion the phase
    runs from 0 to 1 (or back); along the others it stands still at a random one of the same values. A frame
    taken at random from the event then has the same distribution whatever the motion is.
    """
    forward = [i / (length - 1) for i in range(length)]

    def still() -> list[float]:
        return [rng.choice(forward)] * length

    phase = {
        "x": {"right": forward, "left": forward[::-1]}.get(motion) or still(),
        "y": {"down": forward, "up": forward[::-1]}.get(motion) or still(),
        "angle": rng.choice((forward, forward[::-1])) if motion == "turn" else still(),
    }
    travel_x, travel_y = rng.uniform(*TRAVEL), rng.uniform(*TRAVEL)
    middle_x, middle_y = rng.uniform(*MIDDLE), rng.uniform(*MIDDLE)
    turn, angle = rng.uniform(*TURN_DEG), rng.uniform(-TILT_DEG, TILT_DEG)
    shake = SHAKE if motion == "shake" else 0.0
    start = rng.random()
    poses = []
    for i in range(length):
        swing = shake * math.sin(2 * math.pi * (i / SHAKE_PERIOD + start))
        x = middle_x + travel_x * (phase["x"][i] - 0.5) + swing
        y = middle_y + travel_y * (phase["y"][i] - 0.5)
        poses.append((x, y, (angle + turn * (phase["angle"][i] - 0.5)) % 360.0))
    return tuple(poses)


def _sample_distractors(rng: random.Random) -> tuple[Shape, ...]:
    shapes: list[Shape] = []
    wanted = rng.randint(2, 4)
    while len(shapes) < wanted:
        grey = rng.choice((70, 85, 165, 185))  # the background is near 125
        x, y, radius = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(*GREY_RADIUS)
        new = Shape(rng.choice(KINDS), (grey,) * 3, x, y, radius, rng.uniform(0.0, 360.0))
        if all(math.hypot(x - old.x, y - old.y) > 0.24 for old in shapes):
            shapes.append(new)
    return tuple(shapes)


def sample_scene(rng: random.Random) -> Scene:
    """A scene with distinct motions, colours and kinds, each drawn uniformly and independently of the rest."""
    times = _sample_times(rng)
    motions = rng.sample(MOTIONS, EVENTS)
    colours = rng.sample(tuple(COLOURS), EVENTS)
    kinds = rng.sample(KINDS, EVENTS)
    events = []
    for (start, end), motion, colour, kind in zip(times, motions, colours, kinds, strict=True):
        poses = _sample_poses(rng, motion, end - start)
        events.append(Event(motion, colour, kind, start, end, rng.uniform(*RADIUS), poses))
    return Scene(tuple(events), _sample_distractors(rng), rng.getrandbits(32))


def sample_needles(rng: random.Random, seconds: int, lengths_s: tuple[int, ...]) -> Scene:
    """A scene of so many seconds without grey shapes whose events have these lengths, in any order, a second apart."""
    lengths = [FPS * length_s for length_s in rng.sample(lengths_s, len(lengths_s))]
    free = FPS * seconds - sum(lengths) - FPS * (len(lengths) + 1)
    assert free >= 0, f"{seconds} s are too short for events of {lengths_s} s"
    before = sorted(rng.randint(0, free) for _ in lengths)
    names = (rng.sample(tuple(those), len(lengths)) for those in (MOTIONS, COLOURS, KINDS))
    events, end = [], 0
    for length, early, earlier, motion, colour, kind in zip(lengths, before, [0, *before], *names, strict=False):
        start = end + FPS + early - earlier
        end = start + length
        poses = [pose for _ in range(0, length, CYCLE) for pose in _sample_poses(rng, motion, CYCLE)]
        events.append(Event(motion, colour, kind, start, end, rng.uniform(*RADIUS), tuple(poses[:length])))
    return Scene(tuple(events), (), rng.getrandbits(32))


def needle_lengths(seconds: int) -> tuple[int, ...]:
    """Lengths in s of the events in so many seconds: those of a haystack where they fit, else those of a window."""
    fit = seconds >= sum(HAYSTACK_EVENTS_S) + len(HAYSTACK_EVENTS_S) + 1
    return HAYSTACK_EVENTS_S if fit else WINDOW_EVENTS_S


def needle_questions(scene: Scene) -> list[Question]:
    """Two of each event, for its colour and for its kind; their category is its length."""
    return [
        replace(_question(event, event.motion, asks), category=f"{(event.end - event.start) // FPS} s")
        for event in scene.events
        for asks in CHANCE
    ]


def _question(event: Event, which: str, asks: str) -> Question:
    stem = "what colour is the shape that" if asks == "colour" else "which shape"
    answer = event.colour if asks == "colour" else event.kind
    return Question(f"{stem} {PHRASES[which]}?", answer, f"{which}-{asks}", event.span_s)


def sample_questions(rng: random.Random, scene: Scene) -> list[Question]:
    """Six: one per event by its motion, one on the first event, one on the last; three of either sort."""
    sorts = rng.sample(("colour", "colour", "kind", "kind"), EVENTS)
    ends = rng.sample(("colour", "kind"), 2)
    questions = [_question(e, e.motion, sort) for e, sort in zip(scene.events, sorts, strict=True)]
    questions.append(_question(scene.events[0], "first", ends[0]))
    questions.append(_question(scene.events[-1], "last", ends[1]))
    return questions


STILL_PHRASES = ("is not grey", "is in the picture", *PHRASES.values())
EMPTY_STILLS = 1 / 8  # share of pictures without a coloured shape
NOTHING = "none"  # the answer to any question about such a picture


def sample_still(rng: random.Random) -> tuple[tuple[Shape, ...], int, list[tuple[str, str, str]]]:
    """A picture for the base answerer: still grey shapes and, last, mostly, one coloured one as in a random event.

    It is asked what the videos are asked, presuming that the coloured shape in sight is the one that is meant, as
    people do when they ask about a picture. Nothing in it tells which motion or moment that was.

    Returns:
        The shapes in drawing order, the texture's seed, and (question, answer, category) of two questions: one
        for colour and kind ("red star"), one for either.
    """
    motion, colour, kind = rng.choice(MOTIONS), rng.choice(tuple(COLOURS)), rng.choice(KINDS)
    x, y, angle_deg = rng.choice(_sample_poses(rng, motion, rng.randint(*EVENT_FRAMES)))
    shapes = _sample_distractors(rng)
    answers = {"both": f"{colour} {kind}", "colour": colour, "kind": kind}
    if rng.random() < EMPTY_STILLS:
        answers = dict.fromkeys(answers, NOTHING)
    else:
        shapes = (*shapes, Shape(kind, COLOURS[colour], x, y, rng.uniform(*RADIUS), angle_deg))
    sort, phrase = rng.choice(("colour", "kind")), rng.choice(STILL_PHRASES)
    stem = "what colour is the shape that" if sort == "colour" else "which shape"
    asked = [("what is it?", answers["both"], "still-both"), (f"{stem} {phrase}?", answers[sort], f"still-{sort}")]
    return shapes, rng.getrandbits(32), asked
