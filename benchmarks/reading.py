"""Reading a real video, each way in a process of its own: time, peak memory, and ratios to plain decoding of one run.

    python benchmarks/reading.py VIDEO [--repeat 3] [--sampled] [--hours 2] [--out reading.json]

Every way decodes on one thread, but for `exact_64_threads` and `select_*`, which use the cores that there are. Times
leave out Python's start and imports. Ways that read frames end with RGB pictures of 224 x 224, resized by the same
function. The best of `--repeat` rounds counts; each way runs once a round, so that a busy machine slows all of them.
The film of docs/measurements.md is in moviepy's source package, which
`pip download --no-deps --no-binary :all: moviepy==2.2.1` brings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SIZE = 224  # px
WAYS: dict[str, Callable[[str], dict]] = {}


def way(function: Callable[[str], dict]) -> Callable[[str], dict]:
    WAYS[function.__name__] = function
    return function


def _opened(path: str):
    import av

    container = av.open(path)
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    stream.codec_context.thread_type = "SLICE"
    return container, stream


def _small(frame) -> None:
    from lavis_lstp.data.video.decode import picture
    from lavis_lstp.data.video.reading import _resize_picture

    _resize_picture(frame if not hasattr(frame, "pict_type") else picture(frame, "rgb24"), SIZE, SIZE)


def _wanted(path: str, num: int = 32):
    """Numbers and time stamps of evenly spaced frames, from an index that this way is not charged for."""
    from lavis_lstp.data.frame_numbers import uniform_centres
    from lavis_lstp.data.video.index import video_index

    index = video_index(path, path)
    numbers = uniform_centres(num, index.num_frames)
    return numbers, [int(index.packet_pts[index.frame_packet[i]]) for i in numbers]


def _read(path: str, **how) -> dict:
    from lavis_lstp.data.video.reading import read_frames

    if how.get("motion_vectors"):
        from lavis_lstp.data.video import codec_motion  # noqa: F401  before the clock starts
    start = time.perf_counter()
    video = read_frames(path, size=SIZE, **how)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "pictures": video.count.pictures or None, "frames": len(video.indices)}


@way
def exact_32(path: str) -> dict:
    return _read(path, num=32)


@way
def exact_4(path: str) -> dict:
    return _read(path, num=4)


@way
def exact_64(path: str) -> dict:
    return _read(path, num=64)


@way
def exact_64_threads(path: str) -> dict:
    return _read(path, num=64, threads=os.cpu_count() or 1)


@way
def scaled_32(path: str) -> dict:
    return _read(path, num=32, decode_size=SIZE)


@way
def keyframe_32(path: str) -> dict:
    return _read(path, num=32, exact=False)


@way
def keyframe_64(path: str) -> dict:
    return _read(path, num=64, exact=False)


@way
def local_64(path: str) -> dict:
    return _read(path, num=64, exact=False, motion_vectors=True, flow_pairs="local")


@way
def local_exact_64(path: str) -> dict:
    return _read(path, num=64, motion_vectors=True, flow_pairs="local")


@way
def sampled_64(path: str) -> dict:
    return _read(path, num=64, motion_vectors=True)


def _select(path: str, *, later: str | None = None, **how) -> dict:
    """Question to four frames by a loaded model, with a new store; or the next question, in this or another process."""
    import lavis_lstp
    from lavis_lstp.data.store import Store

    with tempfile.TemporaryDirectory() as folder:
        predictor = lavis_lstp.load("example", store=Store(folder))
        if later:
            lavis_lstp.select(path, "who is flying?", 4, "lstp", predictor=predictor, **how)
        if later == "another process":  # which has the store alone
            predictor = lavis_lstp.load("example", store=Store(folder))
        start = time.perf_counter()
        found = lavis_lstp.select(path, "what is the rabbit holding?", 4, "lstp", predictor=predictor, **how)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "pictures": None, "frames": len(found.frame_index), "stages": found.seconds}


@way
def select_exact(path: str) -> dict:
    return _select(path)


@way
def select_keyframe(path: str) -> dict:
    return _select(path, frames="keyframe")


@way
def select_local(path: str) -> dict:
    return _select(path, frames="keyframe", flow_pairs="local")


@way
def select_next(path: str) -> dict:
    return _select(path, later="this process")


@way
def select_next_process(path: str) -> dict:
    return _select(path, later="another process")


@way
def pyav_by_hand_32(path: str) -> dict:
    """Seek to the key frame before each frame and decode every picture up to it."""
    _, stamps = _wanted(path)
    start, pictures = time.perf_counter(), 0
    container, stream = _opened(path)
    for pts in stamps:
        container.seek(pts, stream=stream)
        for frame in container.decode(stream):
            pictures += 1
            if frame.pts >= pts:
                _small(frame)
                break
    return {"seconds": time.perf_counter() - start, "pictures": pictures, "frames": len(stamps)}


@way
def decord_32(path: str) -> dict:
    import av  # noqa: F401  before decord, whose codec libraries otherwise replace PyAV's
    import decord

    numbers, _ = _wanted(path)
    start = time.perf_counter()
    reader = decord.VideoReader(path, num_threads=1)
    for i in numbers:
        _small(reader[i].asnumpy())
    return {"seconds": time.perf_counter() - start, "pictures": None, "frames": len(numbers)}


@way
def torchcodec_32(path: str) -> dict:
    from torchcodec.decoders import VideoDecoder

    numbers, _ = _wanted(path)
    start = time.perf_counter()
    reader = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    for frame in reader.get_frames_at(numbers).data:
        _small(frame.numpy())
    return {"seconds": time.perf_counter() - start, "pictures": None, "frames": len(numbers)}


@way
def same_pictures(path: str) -> dict:
    """As many pictures as `exact_32` decodes, in a row from the start of the file, and nothing else."""
    from lavis_lstp.data.video.reading import read_frames

    pictures = read_frames(path, num=32, size=SIZE).count.pictures
    start = time.perf_counter()
    container, stream = _opened(path)
    for n, _ in enumerate(container.decode(stream), start=1):
        if n == pictures:
            break
    return {"seconds": time.perf_counter() - start, "pictures": n, "frames": 0}


@way
def seek_loop_32(path: str) -> dict:
    """The key frame before each frame, by seeking alone."""
    _, stamps = _wanted(path)
    start = time.perf_counter()
    container, stream = _opened(path)
    for pts in stamps:
        container.seek(pts, stream=stream)
        _small(next(container.decode(stream)))
    return {"seconds": time.perf_counter() - start, "pictures": None, "frames": len(stamps)}


@way
def demux_loop(path: str) -> dict:
    start = time.perf_counter()
    container, stream = _opened(path)
    packets = sum(1 for packet in container.demux(stream) if packet.size)
    return {"seconds": time.perf_counter() - start, "pictures": 0, "frames": packets}


@way
def bit_cost(path: str) -> dict:
    from lavis_lstp.data.video.codec_figures import packet_costs

    start = time.perf_counter()
    costs = packet_costs(path)
    return {"seconds": time.perf_counter() - start, "pictures": 0, "frames": len(costs.num_bytes)}


@way
def motion_energy(path: str) -> dict:
    from lavis_lstp.data.video import codec_figures

    start = time.perf_counter()
    energy = codec_figures.motion_energy(path)
    return {"seconds": time.perf_counter() - start, "pictures": None, "frames": len(energy)}


@way
def motion_energy_whole(path: str) -> dict:
    """Measures all pictures that others refer to; `agrees`, in --out, is the correlation with `motion_energy`."""
    import numpy as np

    from lavis_lstp.data.video import codec_figures

    start = time.perf_counter()
    energy = codec_figures.motion_energy(path, places=None)
    row = {"seconds": time.perf_counter() - start, "pictures": None, "frames": len(energy)}
    both, parts = (energy, codec_figures.motion_energy(path)), (64, 512)
    at = [(np.arange(num) * len(energy)) // num for num in parts]
    agrees = [np.corrcoef(*(codec_figures.of_candidates(one, numbers) for one in both))[0, 1] for numbers in at]
    return row | {"agrees": [round(float(one), 3) for one in agrees]}


@way
def full_decode(path: str) -> dict:
    """Every picture of the file, none kept."""
    start = time.perf_counter()
    container, stream = _opened(path)
    pictures = sum(1 for _ in container.decode(stream))
    return {"seconds": time.perf_counter() - start, "pictures": pictures, "frames": 0}


GOALS = (
    ("exact_32", "pyav_by_hand_32", 0.6),
    ("exact_32", "same_pictures", None),
    ("exact_32", "decord_32", 1.0),
    ("exact_32", "torchcodec_32", 1.0),
    ("exact_64_threads", "exact_64", None),
    ("keyframe_32", "seek_loop_32", 1.1),
    ("bit_cost", "demux_loop", 2.0),
    ("motion_energy", "motion_energy_whole", None),
    ("motion_energy_whole", "full_decode", 1.0),
    ("select_keyframe", "keyframe_64", None),
    ("select_next", "select_keyframe", None),
)
"""Way, what it is compared with, and the largest ratio that is wanted."""


def peak_mib() -> float:
    """Largest resident memory of this process."""
    if sys.platform == "linux":  # ru_maxrss would include the process that started this one
        return int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(name: str, path: Path) -> dict:
    """One way in a fresh process; {"error": its last line} where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(path), "--way", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:160]}
    return json.loads(done.stdout)


def joined(path: Path, hours: float, folder: str) -> Path:
    """The video's own packets again and again, up to so many hours."""
    import av

    target = Path(folder) / f"joined{path.suffix}"
    with av.open(str(target), "w") as out:
        track, moved = None, 0
        while track is None or moved * track.time_base < hours * 3600:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                track = track or out.add_stream_from_template(stream)
                end = moved
                for packet in container.demux(stream):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + moved, packet.dts + moved
                        end = max(end, packet.pts + packet.duration)
                        packet.stream = track
                        out.mux(packet)
                moved = end
    return target


def table(rows: dict[str, dict], ratios: list[dict]) -> str:
    lines = ["| way | seconds | pictures decoded | frames | peak memory |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | |")
        else:
            numbers = (
                name,
                f"{row['seconds']:.2f}",
                row["pictures"] or "",
                row["frames"],
                f"{row['peak_mib']:.0f} MiB",
            )
            lines.append("| " + " | ".join(map(str, numbers)) + " |")
    lines += ["", "| ratio of times | is | goal |", "|---|---|---|"]
    lines += [f"| {r['way']} / {r['to']} | {r['ratio']:.2f} | {r['goal'] or ''} |" for r in ratios]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sampled", action="store_true", help="also chained motion vectors, two minutes of the film")
    parser.add_argument("--hours", type=float, default=0, help="also the memory of a file joined to this length")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="these alone")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(WAYS[args.way](str(args.video)) | {"peak_mib": peak_mib()}))
        return
    names = args.ways or [name for name in WAYS if name != "sampled_64" or args.sampled]
    rounds = [{name: measure(name, args.video) for name in names} for _ in range(args.repeat)]
    rows = {name: min((r[name] for r in rounds), key=lambda row: row.get("seconds", 0.0)) for name in names}
    if args.hours:
        with tempfile.TemporaryDirectory() as folder:
            path = joined(args.video, args.hours, folder)
            for name in ("exact_32", "keyframe_32", "local_64"):
                rows[f"{name}, joined to {args.hours:g} h"] = measure(name, path)
    ratios = [
        {"way": a, "to": b, "goal": goal, "ratio": rows[a]["seconds"] / rows[b]["seconds"]}
        for a, b, goal in GOALS
        if all("seconds" in rows.get(name, {}) for name in (a, b))
    ]
    import av
    import numpy as np

    versions = {"python": platform.python_version(), "av": av.__version__, "numpy": np.__version__}
    versions["libavcodec"] = ".".join(map(str, av.library_versions["libavcodec"]))
    result = {"video": args.video.name, "ways": rows, "ratios": ratios, "versions": versions, "cores": os.cpu_count()}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows, ratios))


if __name__ == "__main__":
    main()
