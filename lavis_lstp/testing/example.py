"""The example that ships with the package: a tiny trained LSTP, one clip of Shapes-QA, and its questions.

    python -m lavis_lstp chain projects/lstp/chains/tiny.yaml --out output/tiny
    python -m lavis_lstp.testing.example output/tiny lavis_lstp/example

In: the folder of that chain, the first half of `make demo`. Out: model.safetensors (parts of base, sampler and LSTP, in
float16), manifest.json, clip.mp4 and questions.json. The clip is of the test split, which no training step reads.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lavis_lstp.errors import run_command
from lavis_lstp.files import write_json

STEPS = ("base", "sampler", "lstp")
"""Later ones replace the parts they hold."""
CLIP = "test-00000"


def make(chain: Path, out: Path) -> None:
    """Write the example's files to the folder `out`."""
    from safetensors.torch import load_file, save_file

    from lavis_lstp.models.weights.hub import weights_file

    merged = {}
    for step in STEPS:
        merged.update(load_file(weights_file(chain / step)))
    out.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half() for key, value in merged.items()}, out / "model.safetensors")
    model = {"arch": "lstp_tiny", "train": [], "flow": {"name": "dis"}}
    config = {"model": model, "datasets": {"lstp_shapes": {"num_frames": 64}}}
    write_json(out / "manifest.json", {"format": "lavis_lstp.checkpoint", "version": 1, "config": config})
    data = chain / "shapes_qa"
    rows = json.loads((data / "test.json").read_text(encoding="utf-8"))
    shutil.copyfile(data / "videos" / "test" / f"{CLIP}.mp4", out / "clip.mp4")
    kept = ("question_id", "question", "answer", "span_s")
    here = {"video_id": "clip", "video": "clip.mp4"}
    asked = [{**{key: row[key] for key in kept}, **here} for row in rows if row["video_id"] == CLIP]
    write_json(out / "questions.json", asked)


def main(argv: Sequence[str]) -> int:
    chain, out = map(Path, argv)
    return run_command(lambda: make(chain, out))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
