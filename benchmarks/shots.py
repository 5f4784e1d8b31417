"""Shot retrieval: shots of real footage are joined, a question names one of them; who chooses frames of that one?

    pip install 'lavis_lstp[real]'
    python benchmarks/shots.py FOLDER [--rounds 4] [--joined 2 4 8] [--frames 1 4] [--work FOLDER] [--out shots.json]

In: a folder with Big Buck Bunny and four clips under the names of `SHOTS`. In each round all shots are joined 2, 4 and
8 at a time in random order, as BOLT (arXiv 2503.21483) joins videos, and each is asked about once. Out: a table with
the share of chosen frames that lie in the shot named. A joined video is a file, and `lavis_lstp.select` reads it.

The shots were cut by eye and their descriptions written before any scorer had seen them. Shots are of equal length, so
a way that knows nothing is right once in `joined`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lavis_lstp import select, select_from_scores
from lavis_lstp.data.shapes.shapes_qa import write_video
from lavis_lstp.data.video.reading import read_frames
from lavis_lstp.files import write_json

FILM = "big_buck_bunny_596s_720p.mp4"
SHOTS = (  # file, second where it begins, what it shows
    (FILM, 6.5, "trees under a pink sky"),
    (FILM, 16.5, "a bird on a branch"),
    (FILM, 28.0, "the title of the film"),
    (FILM, 38.5, "somebody asleep in a dark burrow"),
    (FILM, 48.2, "a rabbit that comes out of its burrow"),
    (FILM, 64.5, "white flowers"),
    (FILM, 84.5, "a rabbit with a red apple"),
    (FILM, 132.0, "a rabbit in front of a thick tree trunk"),
    (FILM, 247.0, "a rabbit that pulls at a vine in the forest"),
    (FILM, 271.0, "a rabbit that jumps over a rope"),
    (FILM, 281.6, "the angry face of a rabbit, very close"),
    (FILM, 327.0, "three rodents close together"),
    (FILM, 347.0, "a small rodent beside a large rock"),
    (FILM, 356.2, "a hollow log"),
    (FILM, 367.0, "a fat rabbit behind a small rodent"),
    (FILM, 431.0, "a flying squirrel above the tops of trees"),
    (FILM, 446.0, "sharp wooden stakes like a fence"),
    (FILM, 462.5, "an empty meadow beside a large tree"),
    (FILM, 492.5, "the names of the people who made the film"),
    (FILM, 585.2, "a squirrel between clouds"),
    ("world_30s.mp4", 2.0, "the Earth seen from space"),
    ("city_cc0_8s.mpg", 0.5, "skyscrapers at night"),
    ("living_room_6s.mp4", 2.0, "a child who plays in a living room"),
    ("peppers_9s.mp4", 3.0, "red and yellow peppers on a baking tray"),
)
QUESTION = "When do we see {}?"
LENGTH, FPS, SIZE = 25, 10, (180, 320)  # frames of a shot; frames a second, as write_video has; px
PER_SHOT = 5  # candidates that are scored
WAYS: dict[str, dict[str, Any]] = {
    "evenly spaced": {"method": "uniform"},
    "bitcost": {"method": "bitcost"},
    "lstp": {"method": "lstp"},
    "topk, sampler": {"method": "topk"},
    **{f"{rule}, conse": {"method": rule, "scorer": "conse"} for rule in ("topk", "aks", "inverse_transform")},
}


def chosen(path: Path, question: str, place: int, joined: int, k: int) -> Iterator[tuple[str, np.ndarray]]:
    """Each way, and the numbers of the shots, by their places in the file, that its frames lie in."""
    for name, way in WAYS.items():
        scored = {} if way["method"] in ("uniform", "bitcost") else {"num_candidates": PER_SHOT * joined}
        yield name, np.asarray(select(path, question, k, **way, **scored).frame_index) // LENGTH
    gold = (place * PER_SHOT, (place + 1) * PER_SHOT)
    frames = select_from_scores(np.zeros(PER_SHOT * joined), k, "uniform_in_span", span=gold)
    yield "oracle", np.asarray(frames) // PER_SHOT


def measured(shots: Sequence[np.ndarray], joined: int, done: int, ks: Sequence[int], work: Path) -> Iterator[dict]:
    """Rows of one round: one for each question, number of frames and way."""
    order = np.random.default_rng([joined, done]).permutation(len(shots))
    for i, group in enumerate(order.reshape(-1, joined)):
        path = work / f"{joined}-{done}-{i}.mp4"
        if not path.exists():
            write_video(path, (frame for shot in group for frame in shots[shot]), key_frames=())
        for place, shot in enumerate(group):
            question = QUESTION.format(SHOTS[shot][2])
            for k in ks:
                told = {"joined": joined, "frames": k, "video": path.stem, "shot": int(shot)}
                for way, places in chosen(path, question, place, joined, k):
                    right = places == place
                    yield {**told, "way": way, "right": float(right.mean()), "seen": float(right.any())}


def share(rows: Sequence[dict], key: str) -> str:
    """The mean over videos in percent, and half of its 95 % interval."""
    videos: dict[str, list[float]] = {}
    for row in rows:
        videos.setdefault(row["video"], []).append(100 * row[key])
    means = np.asarray([np.mean(one) for one in videos.values()])
    return f"{means.mean():.1f} ± {1.96 * means.std(ddof=1) / len(means) ** 0.5:.1f}"


def table(rows: Sequence[dict]) -> str:
    """Markdown: a way a line; for each number of frames and shots the share of frames in the right shot, and how often
    one of several frames is in it."""
    columns = sorted({(row["frames"], row["joined"], key) for row in rows for key in ("right", "seen")})
    columns = [one for one in columns if one[0] > 1 or one[2] == "right"]
    names = [f"{k} of {n} shots, {key}" for k, n, key in columns]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(columns) + 1) + "|"]
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        found = [share([r for r in mine if (r["frames"], r["joined"]) == (k, n)], key) for k, n, key in columns]
        lines.append(f"| {way} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--joined", type=int, nargs="+", default=[2, 4, 8], help="divisors of the number of shots")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--work", type=Path, help="keeps the joined videos; files that are there are not made again")
    parser.add_argument("--out", type=Path, help="every question's row, as JSON, written after each round")
    args = parser.parse_args(argv)
    steps = np.arange(LENGTH) / FPS
    read = {"size": SIZE, "decode_size": min(SIZE)}
    shots = [
        read_frames(args.folder / file, times_s=(start + steps).tolist(), **read).frames.transpose(0, 2, 3, 1)
        for file, start, _ in SHOTS
    ]
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        rows: list[dict] = []
        for done in range(args.rounds):
            rows += [row for n in args.joined for row in measured(shots, n, done, args.frames, work)]
            print(f"round {done + 1} of {args.rounds}", file=sys.stderr)
            if args.out:
                write_json(args.out, rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
