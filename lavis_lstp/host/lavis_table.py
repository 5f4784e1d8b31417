"""What each model of salesforce-lavis 1.0.2 can do under the installed transformers; `lavis-lstp doctor --lavis`.

Every cell is what `tests/host/test_lavis_table.py` finds with tiny random weights: whether `from_config` builds the
model, whether `forward` runs, whether the method that the model is for does, and whether a training step gives
gradients. None = the model has no such thing.
"""

from __future__ import annotations

from typing import NamedTuple

ITM = "scores image and text; the scorer of AKS and FOCUS"
"""What BLIP's matching models are for."""


class Row(NamedTuple):
    name: str
    purpose: str
    method: str | None
    build: bool = True
    forward: bool | None = True
    works: bool | None = True
    train: bool | None = True
    note: str = ""


_FID = "its encoder is wrapped by way of T5's `parallelize`, which transformers 5 dropped; 4.57 is untested"
ROWS = (
    Row("albef_classification", "classifies image and text", "predict"),
    Row("albef_feature_extractor", "features", "extract_features", forward=None, train=None),
    Row("albef_nlvr", "compares two images", "predict"),
    Row("albef_pretrain", "pretraining", None, works=None),
    Row("albef_retrieval", "retrieval", "compute_sim_matrix"),
    Row("albef_vqa", "answers from a list", "predict_answers"),
    Row("alpro_qa", "answers about video, as a class", "predict"),
    Row("alpro_retrieval", "retrieval of video", None, works=None),
    Row("blip2", "pretraining of the Q-Former", "generate"),
    Row("blip2_feature_extractor", "features", "extract_features"),
    Row("blip2_image_text_matching", ITM, "forward", train=None, note="one text at a time, or texts of equal length"),
    Row("blip2_opt", "answers and captions", "generate"),
    Row("blip2_t5", "answers and captions", "predict_answers"),
    Row("blip_caption", "captions", "generate"),
    Row(
        "blip_classification",
        "classifies image and text",
        "predict",
        forward=False,
        train=False,
        note="LAVIS gives its own output class a field that it lacks, and without use_distill reads a name never set",
    ),
    Row("blip_feature_extractor", "features", "extract_features", forward=None, train=None),
    Row("blip_image_text_matching", ITM, "forward", train=None),
    Row("blip_nlvr", "compares two images", "predict"),
    Row("blip_pretrain", "pretraining", None, works=None),
    Row("blip_retrieval", "retrieval", "compute_sim_matrix"),
    Row("blip_vqa", "answers", "predict_answers"),
    Row("clip", "scores image and text", "extract_features"),
    Row("clip_feature_extractor", "features", "extract_features"),
    Row(
        "gpt_dialogue",
        "dialogue about video",
        "forward",
        forward=False,
        works=False,
        train=False,
        note="from_config returns transformers' plain GPT-2, which takes no samples",
    ),
    Row(
        "img2prompt_vqa",
        "answers by captions",
        "predict_answers",
        build=False,
        forward=None,
        works=False,
        train=None,
        note="needs spaCy's en_core_web_sm, and downloads T5-large",
    ),
    Row("pnp_unifiedqav2_fid", "reads captions", "generate", False, None, False, None, _FID),
    Row("pnp_vqa", "answers by captions", "predict_answers", False, None, False, None, "contains pnp_unifiedqav2_fid"),
)


def table() -> str:
    """The rows as text, one model a line."""
    import transformers

    words = {True: "yes", False: "no", None: "-"}
    head = ("model", "build", "forward", "method", "train", "")
    lines = [head] + [
        (row.name, words[row.build], words[row.forward], _method(row, words), words[row.train], row.note or row.purpose)
        for row in ROWS
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    about = f"models of salesforce-lavis 1.0.2, here under transformers {transformers.__version__}"
    return "\n".join([about, *text])


def _method(row: Row, words: dict[bool | None, str]) -> str:
    return "-" if row.method is None else f"{row.method}: {words[row.works]}"
