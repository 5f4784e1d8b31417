"""Instruction data of images, videos and texts: their files, their samples, and all three in one batch."""

from __future__ import annotations

import gc
import json
import logging
import unicodedata
from pathlib import Path

import pytest
import torch
from lavis.models import load_model
from torch.utils.data import Dataset
from video_files import ACCENTS

from lavis_lstp.data.instruct import read_instructions
from lavis_lstp.data.spans import read_spans
from lavis_lstp.errors import AnnotationError, ConfigError, VideoError
from lavis_lstp.runners.data_order import Batches
from lavis_lstp.runners.splits import join
from lavis_lstp.schema import Span
from lavis_lstp.tasks.pseudo_span import PseudoSpanTask
from lavis_lstp.testing import tiny_instruct

KINDS = ("image", "video", "text")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return tiny_instruct.write_instruct(tmp_path_factory.mktemp("instruct"))


@pytest.fixture
def built(build, files):
    """(kind, changes) -> the train split of that kind, of both annotation files."""

    def built(kind: str, *names: str, **changes):
        folder = {"image": "images", "video": "videos"}.get(kind)
        storage = [str(files[name]) for name in names or ("train", "nlp_tune")]
        info = {"annotations": {"train": {"storage": storage}}}
        if folder:
            info[folder] = {"storage": str(changes.pop("root", files["root"]))}
        changes = {"image_size": 32, **({"num_frames": 8} if kind == "video" else {}), **changes}
        return build(f"lstp_{kind}_instruct", build_info=info, **changes)["train"]

    return built


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def written(path: Path, content) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# ---------------------------------------------------------------- files


def test_the_tiny_folder_is_the_same_each_time(files, tmp_path):
    again = tiny_instruct.write_instruct(tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(made) == 2 * tiny_instruct.COUNT + len(again) - 1
    for path in made:
        assert (tmp_path / path).read_bytes() == (files["root"] / path).read_bytes(), path


def test_the_tiny_folder_from_the_command_line(tmp_path, capsys):
    assert tiny_instruct.main([str(tmp_path), "--num-frames", "32", "--short-videos", "double"]) == 0
    assert "train.json" in capsys.readouterr().out
    assert len(read_spans(tmp_path / "spans.json", 32, short_videos="double")) == 2 * tiny_instruct.COUNT


def test_the_inputs_of_the_recipes(tmp_path, capsys):
    assert tiny_instruct.main([str(tmp_path / "inputs"), "--recipes"]) == 0
    assert f"run them from {tmp_path}" in capsys.readouterr().out
    seen: dict[str, list[str]] = {}
    for folder, media in (("ivinstruct", "."), ("videoinstruct", "video"), ("own", "videos")):
        for split in ("train", "val", "test"):
            content = json.loads((tmp_path / "inputs" / folder / f"{split}.json").read_text())
            for row in content.values() if isinstance(content, dict) else content:
                name = row.get("video") or row.get("image") or f"{row['video_id']}.mp4"
                assert (tmp_path / "inputs" / folder / media / name).is_file()
                seen.setdefault(f"{folder} {name}", []).append(split)
    assert len(seen) == 4 * tiny_instruct.COUNT and all(len(splits) == 1 for splits in seen.values())


def test_each_kind_takes_its_rows_out_of_mixed_files(built):
    image, video, text = (built(kind) for kind in KINDS)
    assert [len(dataset) for dataset in (image, video, text)] == [5, 5, 6]
    assert image.question_ids() == ["0000", "0000#2", "0000#3", "0000#4", "0000#5"]  # all are called 0000 there
    assert video.question_ids() == [f"clip-{i}" for i in range(5)]
    assert text.question_ids() == [str(i) for i in range(6)]


@pytest.mark.parametrize("key", ["videos", "images", "Video", "video_path", "image-file", "media", "IMG"])
def test_a_row_that_names_its_file_under_another_key_is_no_text(tmp_path, key):
    row = {"id": 7, key: ["a.mp4"], "conversations": turns("<video>\nWhat?", "A man.")}
    path = written(tmp_path / "rows.json", [{"id": 6, "conversations": turns("Hi", "Hello")}, row])
    for kind in KINDS:
        with pytest.raises(AnnotationError, match=rf"rows\.json, entry 1 \(id 7\): has '{key}', .*'image' or 'video'"):
            read_instructions([path], kind=kind)


def test_a_list_of_one_file_is_the_file(tmp_path):
    def read(*names):
        row = {"id": 7, "image": names, "conversations": turns("<image>\nWhat?", "A man.")}
        return read_instructions([written(tmp_path / "rows.json", [row])], kind="image")

    assert [row["image"] for row in read("a.jpg")] == ["a.jpg"]
    for names in ((), ("a.jpg", "b.jpg")):
        with pytest.raises(
            AnnotationError, match=rf"entry 0 \(id 7\): 'image' names {len(names)} files; a row has one"
        ):
            read(*names)


def test_texts_with_a_medium_token_are_counted(tmp_path, caplog):
    """They are taken: people talk about HTML, and the published data holds such rows."""
    rows = [turns("Hi", "Hello"), turns("<video>\nWhat?", "A man."), turns("What does <image> do in RSS?", "It shows.")]
    rows = [{"id": i, "conversations": row, "source": "web"} for i, row in enumerate(rows)]
    path = written(tmp_path / "rows.json", rows)
    assert len(read_instructions([path], kind="text")) == 3
    assert "rows.json, entry 1 (id 1): the first of 2 conversations that hold <image> or <video>" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_answers_with_a_medium_token_are_said_to_be_rewritten(tmp_path, caplog, kind):
    """Markdown may hold one: the published code moves it to the front of every turn."""
    medium = {} if kind == "text" else {kind: "a"}
    rows = [
        {"id": i, **medium, "conversations": turns("Parse it.", answer)}
        for i, answer in enumerate(("#", "![1](<image>)"))
    ]
    _, row = read_instructions([written(tmp_path / "rows.json", rows)], kind=kind)
    assert row["answer"] == "<image>\n![1]()"
    assert "entry 1 (id 1): the first of 1 conversations that hold <image> or <video> in an answer" in caplog.text


def test_preferences_and_empty_answers_are_not_taken_in_silence(tmp_path, caplog):
    row = {"id": 7, "conversations": turns("What?"), "chosen": {"from": "gpt", "value": "A man."}}
    with pytest.raises(AnnotationError, match=r"entry 0 \(id 7\): is a row of preferences \('chosen', 'rejected'\)"):
        read_instructions([written(tmp_path / "rows.json", [row])], kind="text")
    rows = [{"id": i, "conversations": turns("What?", answer)} for i, answer in enumerate(("A man.", " "))]
    assert len(read_instructions([written(tmp_path / "rows.json", rows)], kind="text")) == 2
    assert "entry 1 (id 1): the first of 1 conversations that have an empty answer" in caplog.text


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_prompt_that_is_not_read_is_said(tmp_path, caplog, key):
    rows = [
        {"id": i, key: text, "conversations": turns("Hi", "Hello")} for i, text in enumerate(("", "Answer in French."))
    ]
    (first, second) = read_instructions([written(tmp_path / "rows.json", rows)], kind="text")
    assert first["prompt"] == second["prompt"]
    assert "entry 1 (id 1): the first of 1 conversations that have a system prompt, which is not read" in caplog.text


def test_samples_of_conversations(built):
    image, video, text = (built(kind) for kind in KINDS)
    sample = image[1]
    assert (
        sample["prompt"]
        == "USER: <image>\nWhat is this?  ASSISTANT: A green square. </s>USER: Which colour?  ASSISTANT: "
    )
    assert (sample["text_input"], sample["text_output"]) == ("Which colour?", "green")
    assert sample["frames"].shape == (1, 3, 32, 32) and sample["video_id"] == "picture-1"
    sample = video[1]
    assert sample["prompt"] == "USER: <video>\nWhat appears in the video?  ASSISTANT: "
    assert sample["text_input"] == "What appears in the video?"
    assert sample["frames"].shape == (8, 3, 32, 32) and sample["video_id"] == "clip-1"
    sample = text[1]
    assert sample["prompt"] == "USER: What is 1 plus 1?  ASSISTANT: 2 </s>USER: Thank you.  ASSISTANT: "
    assert (sample["text_input"], sample["text_output"]) == ("Thank you.", "")
    assert sample["frames"].shape == (0, 3, 32, 32) and sample["video_id"] == ""


def test_the_video_only_form(built, files):
    dataset = built("video", "videoinstruct", root=files["root"] / "videochatgpt_tune", form="questions")
    sample = dataset[2]
    assert (sample["question_id"], sample["video_id"]) == ("clip-2_q", "clip-2")
    assert sample["prompt"] == "USER: Which colour has the shape?ASSISTANT: "
    assert (sample["text_input"], sample["text_output"]) == ("Which colour has the shape?", "blue")
    with pytest.raises(VideoError, match=r"clip-0\.mp4: no such file"):
        built("video", "videoinstruct", form="questions")  # of the folder above


@pytest.mark.parametrize("name", ["a.mkv", "a.MOV"])
def test_any_ending_of_a_video_is_found(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    path = written(tmp_path / "q.json", {"1": {"q": "what?", "a": "this", "video_id": "a"}})
    assert read_instructions([path], kind="video", form="questions", root=tmp_path)[0]["video"] == name


@ACCENTS
def test_a_video_is_found_whose_file_name_encodes_accents_otherwise(tmp_path):
    (tmp_path / unicodedata.normalize("NFD", "\u00e9.wmv")).touch()
    path = written(tmp_path / "q.json", {"1": {"q": "?", "a": "!", "video_id": "\u00e9"}})
    (entry,) = read_instructions([path], kind="video", form="questions", root=tmp_path)
    assert entry["video"] == "\u00e9.wmv"


def test_repeated_ids_get_numbers_that_are_free(tmp_path):
    names = ["a", "a#2", "a", "b", "a", 7, "7"]
    rows = [{"id": name, "conversations": turns("q", str(i))} for i, name in enumerate(names)]
    paths = [written(tmp_path / "1.json", rows[:3]), written(tmp_path / "2.json", rows[3:])]
    found = read_instructions(paths, kind="text")
    assert [row["question_id"] for row in found] == ["a", "a#2", "a#3", "b", "a#4", "7", "7#2"]
    assert [row["answer"] for row in found] == [str(i) for i in range(7)]


def test_json_lines_are_conversations(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"id": i, "conversations": turns("q", "a")}) for i in range(3)))
    assert len(read_instructions([path], kind="text")) == 3


def test_conversations_that_end_with_the_user_are_counted(tmp_path, caplog):
    path = written(tmp_path / "a.json", [{"id": 1, "conversations": turns("q", "a", "thanks")}])
    with caplog.at_level(logging.WARNING):
        (row,) = read_instructions([path], kind="text")
    assert (row["question"], row["answer"]) == ("q", "thanks")
    assert "1 conversations that end with the user's turn" in caplog.text


ROW = {"id": "r1", "image": "a.png", "conversations": turns("q", "a")}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"image": "a.png", "conversations": turns("q", "a")}], "entry 0: key 'id' is missing"),
        ([{"id": "r1", "image": "a.png"}], "(id 'r1'): key 'conversations' is missing"),
        ([{**ROW, "image": 3}], "(id 'r1'): 'image' must be a string, got int 3"),
        ([{**ROW, "id": None}], "'id' must be a string or a whole number, got NoneType"),
        ([{**ROW, "video": "a.mp4"}], "(id 'r1'): has image and video; expected one"),
        ([{**ROW, "model": "x"}], "(id 'r1'): has image and model; expected one"),
        ([{**ROW, "conversations": {}}], "'conversations' must be a list, got dict"),
        ([{**ROW, "conversations": []}], "(id 'r1'): 'conversations' has no turn of 'human'"),
        ([ROW, {**ROW, "conversations": [{"from": "bot", "value": ""}]}], "entry 1 (id 'r1'): 'conversations', turn 0"),
        (["text"], "entry 0: expected an object, got str"),
        ([{"id": 1, "conversations": turns("q", "a")}], "no row of the kind 'image' among 1 (datasets.x)"),
        ([], "holds no question"),
        ({"r1": {"q": "q", "a": "a", "video_id": "v"}}, "holds an object by id, not the form 'conversations'; set"),
        ({"r1": {"q": "q", "a": "a", "video_id": "v"}}, "set datasets.x.form: questions"),
    ],
)
def test_what_is_wrong_with_a_file_of_conversations(tmp_path, rows, said):
    path = written(tmp_path / "a.json", rows)
    with pytest.raises(AnnotationError) as error:
        read_instructions([path], kind="image", section="datasets.x")
    assert str(path) in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROW], "holds rows of conversations, not the form 'questions'; set datasets.x.form: conversations"),
        ({"1": {"q": "q", "a": "a"}}, "id '1': key 'video_id' is missing; it has q, a"),
        ({"1": {"q": None, "a": "a", "video_id": "v"}}, "id '1': 'q' must be a string"),
        ({"1": {"q": "q", "a": "a", "video_id": "v"}, "2": 3}, "id '2': expected an object, got int"),
        ({}, "holds no question"),
    ],
)
def test_what_is_wrong_with_a_file_of_questions(tmp_path, rows, said):
    path = written(tmp_path / "a.json", rows)
    with pytest.raises(AnnotationError) as error:
        read_instructions([path], kind="video", form="questions", section="datasets.x")
    assert str(path) in str(error.value) and said in str(error.value)


def test_json_lines_of_conversations_are_not_questions(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n")
    with pytest.raises(AnnotationError, match="form: conversations"):
        read_instructions([path], kind="video", form="questions")


def test_settings_that_do_not_go_with_instructions(built, files):
    with pytest.raises(ConfigError, match=r"unknown datasets\.lstp_video_instruct\.form 'question'; did you mean"):
        built("video", form="question")
    with pytest.raises(ConfigError, match="'questions' is a form of videos alone"):
        read_instructions([files["videoinstruct"]], kind="image", form="questions")
    with pytest.raises(ConfigError, match=r"lstp_image_instruct\.build_info\.images\.storage: no such folder: gone"):
        built("image", root="gone")
    with pytest.raises(ConfigError, match=r"lstp_text_instruct\.text_processor"):
        built("text", text_processor={"train": {"name": "blip_question"}})


# ---------------------------------------------------------------- spans


def test_all_three_forms_of_spans_say_the_same(built, files):
    def spans(**settings) -> list:
        dataset = built("video", **settings)
        return [dataset[i]["span"].tolist() for i in range(len(dataset))]

    own = spans(spans=str(files["spans"]))
    assert own[:2] == [[1, 5], [2, 5]]
    for form in ("indices", "fractions"):
        assert spans(spans=str(files[f"pseudo_label_{form}"]), spans_form=form) == own
    with pytest.raises(AnnotationError, match=r"datasets\.lstp_video_instruct\.spans_form: indices or fractions"):
        spans(spans=str(files["pseudo_label_indices"]))


def test_the_video_only_form_has_spans_of_its_own(built, files):
    settings = {"root": files["root"] / "videochatgpt_tune", "form": "questions", "spans_form": "indices"}
    dataset = built("video", "videoinstruct", spans=str(files["pseudo_label_indices"]), **settings)
    assert dataset[0]["span"].tolist() == [1, 5]


# ---------------------------------------------------------------- batches of all kinds


def mixed(built, **settings):
    return join({f"lstp_{kind}_instruct": built(kind, **settings) for kind in KINDS})


@pytest.mark.parametrize("flow", ["none", "motion_vectors"])
def test_kinds_share_a_batch(built, flow):
    joined = mixed(built, flow=flow, flow_size=16)
    batch = joined.collater([joined[i] for i in (0, 5, 10)])
    assert batch["frame_mask"].tolist() == [[1] + 7 * [0], 8 * [1], 8 * [0]]
    assert batch["frames"].shape == (3, 8, 3, 32, 32)
    assert ("flow" in batch) == (flow != "none")
    if "flow" in batch:
        assert batch["flow"].shape == (3, 8, 2, 16, 16) and not batch["flow"][[0, 2]].any() and batch["flow"][1].any()
    assert [prompt[:12] for prompt in batch["prompt"]] == ["USER: <image", "USER: <video", "USER: What i"]


def test_the_model_learns_and_answers_a_mixed_batch(built):
    model = load_model("lstp_tiny", "default", device="cpu").eval()
    joined = mixed(built, image_size=64, flow="motion_vectors", flow_size=32)
    samples = [joined[i] for i in (0, 5, 10)]
    whole = joined.collater(samples)
    assert torch.isfinite(model(whole)["lm_loss"])
    for name in ("predict_answers", "pseudo_scores"):
        assert len(getattr(model, name)(whole)) == 3
    assert len(model.predict_answers(joined.collater(samples[2:]))) == 1  # texts alone


class Other(Dataset):
    """As LAVIS's data sets: other keys than this package's."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"question_id": str(index), "image_id": str(index)} if index else None

    def collater(self, samples):
        return {key: [sample[key] for sample in samples] for key in samples[0]}


class Third(Other):
    def __getitem__(self, index):
        return {"question_id": str(index)}


@pytest.mark.parametrize("workers", [0, 1])
def test_no_key_is_dropped_in_silence(workers):
    joined = join({"a": Other(), "b": Third()})
    assert joined.collater([joined[2], joined[3]]) == {"question_id": ["0", "1"]}
    loader, said = Batches(joined, seed=0, num_workers=workers), []
    try:
        list(loader([(1, 3)]))
    except ConfigError as error:
        said.append(str(error))
    del loader  # before any other test measures how long that takes
    gc.collect()
    assert said == ["samples of data set 'a' have 'image_id', those of 'b' do not: they cannot share a batch"]


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("image", {"flow": "motion_vectors"}, "flow is given in one and none in the other"),
        ("text", {"image_size": 48}, "image_size is 32 in one and 48 in the other"),
        ("image", {"vis_processor": {"train": {"name": "blip_image_eval"}}}, "vis_processor is given in one"),
    ],
)
def test_settings_that_keep_kinds_apart_are_named_at_the_start(built, kind, settings, said):
    parts = {f"lstp_{name}_instruct": built(name, **(settings if name == kind else {})) for name in KINDS}
    with pytest.raises(ConfigError) as error:
        join(parts)
    assert said in str(error.value) and f"lstp_{kind}_instruct" in str(error.value) and "\n" not in str(error.value)


def test_flow_and_frames_of_videos_must_agree(built, files):
    def two(one: dict, other: dict):
        return join({"a": built("video", **one), "b": built("video", **other)})

    with pytest.raises(ConfigError, match="'a' and 'b' .*, but num_frames is 8 in one and 4 in the other"):
        two({}, {"num_frames": 4})
    with pytest.raises(ConfigError, match="flow_size is 16 in one and 32 in the other; set datasets.a.flow_size"):
        two({"flow": "motion_vectors", "flow_size": 16}, {"flow": "motion_vectors"})
    two({"flow": "motion_vectors", "flow_size": 32}, {"flow": "motion_vectors"})


# ---------------------------------------------------------------- labelling


class FrameScorer(torch.nn.Module):
    def pseudo_scores(self, samples):
        mask = samples["frame_mask"]
        return mask * (torch.arange(mask.shape[1]) > 1)


def test_only_what_moves_gets_a_pseudo_span(built, tmp_path):
    joined = mixed(built)
    rows = [joined[i] for i in (0, 5, 6, 10)]
    task = PseudoSpanTask({"test_splits": ["train"], "spans_out": str(tmp_path / "spans.json")})
    records = task.valid_step(FrameScorer(), joined.collater(rows))
    assert [record["span"] for record in records] == [None, [2, 8], [2, 8], None]
    metrics = task.metrics(records)
    assert (metrics["labelled"], metrics["without_span"], metrics["mean_span_frames"]) == (2, 2, 6)
    video = built("video")
    done = [*records[:3], *({**records[1], "question_id": f"clip-{i}"} for i in (2, 3, 4)), records[3]]
    options = {"dataset": video, "result_dir": tmp_path, "output_dir": tmp_path, "allow_partial": True}
    task.after_evaluation([r for r in done if r["question_id"].startswith("clip")], "train", 0, **options)
    assert read_spans(tmp_path / "spans.json", 8)["clip-4"] == Span(2, 8)
    assert built("video", spans=str(tmp_path / "spans.json"))[0]["span"].tolist() == [2, 8]
    with pytest.raises(AnnotationError, match="made with short_videos keep, .*short_videos is double"):
        built("video", spans=str(tmp_path / "spans.json"), short_videos="double")
    options["dataset"] = built("video", short_videos="double", fps=9)
    task.after_evaluation([records[1]], "train", 0, **options)
    assert read_spans(tmp_path / "spans.json", 8, short_videos="double", fps=9) == {"clip-0": Span(2, 8)}
