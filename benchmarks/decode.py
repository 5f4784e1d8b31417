"""32 frames of a ten-minute video against decoding all of it: time, and peak memory of a process of its own.

    python benchmarks/decode.py [--seconds 583] [--video FILE] [--decord]

Writes a 640 x 360 H.264 video with libx264's default settings (a key frame every 250 at most), unless one is given,
reads it each way in a fresh process on one thread, and prints one JSON object. Ratios come from one run. The target is
1/10 of the time and 1/50 of the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

WORKER = """
import json, sys, time
how, path, size = sys.argv[1], sys.argv[2], int(sys.argv[3]) or None
start = time.perf_counter()
if how == "all":  # as published: every frame in memory, then pick
    import av, numpy as np
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        from av.video.reformatter import VideoReformatter
        convert = VideoReformatter()
        every = [convert.reformat(f, format="rgb24", threads=1).to_ndarray() for f in container.decode(stream)]
    frames = np.stack(every[:: max(1, len(every) // 32)][:32])
    decoded = len(every)
else:
    from lavis_lstp.data.video.reading import read_frames
    video = read_frames(path, num=32, size=size, backend=how)
    frames, decoded = video.frames, video.count.pictures
seconds = time.perf_counter() - start
if sys.platform == "linux":  # ru_maxrss would include the process that started this one
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
else:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": round(seconds, 3), "peak_mib": round(peak, 1), "pictures_decoded": decoded,
                  "frames": list(frames.shape)}))
"""


def make_video(path: Path, seconds: float, width: int = 640, height: int = 360, fps: int = 25) -> None:
    """Textures that move, with a new one every seven seconds, and some noise."""
    import av
    import cv2
    import numpy as np

    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast"}
        for number in range(int(seconds * fps)):
            at = number % (7 * fps)
            if at == 0:
                noise = random.integers(0, 256, (height + 200, width + 400, 3), dtype=np.uint8)
                texture = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 4), None, 0, 255, cv2.NORM_MINMAX)
            y, x = 100 + round(80 * np.sin(at / 20)), at * 2
            picture = np.ascontiguousarray(texture[y : y + height, x : x + width])
            picture[:: random.integers(2, 9), :: random.integers(2, 9)] ^= 8
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


def measure(how: str, path: Path, size: int = 0) -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, how, str(path), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{how}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=583)
    parser.add_argument("--video", type=Path, help="a file to read instead")
    parser.add_argument("--decord", action="store_true", help="measure decord too")
    args = parser.parse_args()
    import av
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = args.video or Path(folder) / "long.mp4"
        if args.video is None:
            make_video(path, args.seconds)
        from lavis_lstp.data.video.reading import probe

        info = probe(path)
        result = {
            "video": {"seconds": round(info.duration_s, 2), "frames": info.num_frames, "width": info.width},
            "all": measure("all", path),
            "chosen": measure("pyav", path),
            "chosen_224": measure("pyav", path, 224),
        }
        if args.decord:
            result["chosen_decord"] = measure("decord", path)
    for key in ("chosen", "chosen_224", "chosen_decord"):
        if key in result:
            result[f"{key}_ratio"] = {
                "time": round(result["all"]["seconds"] / result[key]["seconds"], 1),
                "memory": round(result["all"]["peak_mib"] / result[key]["peak_mib"], 1),
            }
    result["versions"] = {
        "python": platform.python_version(),
        "av": av.__version__,
        "ffmpeg_libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
