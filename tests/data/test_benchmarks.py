"""Benchmarks in their authors' files, made small: read by default, joined by id, refused with a line."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lavis.common.registry import registry
from lavis.datasets.builders import load_dataset
from test_wds_verify import rewritten

from lavis_lstp.config import Config
from lavis_lstp.data.benchmarks import BENCHMARKS, described, read_answers, read_benchmark
from lavis_lstp.data.shards.format import dump_frames, parse_frames
from lavis_lstp.data.subtitles import read_subtitles
from lavis_lstp.errors import AnnotationError, ConfigError, ShardError, VideoError
from lavis_lstp.files import write_json
from lavis_lstp.host import evaluate
from lavis_lstp.testing import tiny_benchmarks
from lavis_lstp.testing.tiny_benchmarks import WRITERS, write_benchmarks
from webdataset_tools.__main__ import main as tools

MVBENCH = BENCHMARKS["lstp_mvbench"].forms["authors"].files
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(root)
    return root


@pytest.fixture
def here(files, tmp_path, monkeypatch) -> Path:
    """A copy to stand in and change."""
    shutil.copytree(files / "inputs", tmp_path / "inputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "inputs"


def build(name: str, *options: str) -> dict:
    """Data sets by split, as `lavis.evaluate` builds them from a YAML that only names the benchmark."""
    path = Path("run.yaml")
    path.write_text(
        f"model: {{arch: lstp_tiny}}\ndatasets: {{lstp_{name}: {{}}}}\nrun: {{task: video_qa}}\n", encoding="utf-8"
    )
    given = ["num_frames=4", "image_size=64", *options]
    config = Config(SimpleNamespace(cfg_path="run.yaml", options=[f"datasets.lstp_{name}.{o}" for o in given]))
    section = config.datasets_cfg[f"lstp_{name}"]
    return registry.get_builder_class(f"lstp_{name}")(section).build_datasets()


def answers(dataset) -> list[tuple]:
    return [(row["question_id"], row["question"], row["answer"]) for row in dataset.annotation]


def test_every_benchmark_has_a_writer_a_file_and_a_builder():
    names = {name.removeprefix("lstp_") for name in BENCHMARKS}
    assert names == set(WRITERS)
    assert all(registry.get_builder_class(f"lstp_{name}") is not None for name in names)


COUNTS = {"egoschema": {"subset": 2}, "mvbench": {"test": 20}, "star": {"val": 6}}
COUNTS |= {"longvideobench": {"val": 6}, "qvhighlights": {"val": 6}, "cgbench": {"mini": 6}, "mlvu": {"dev": 7}}
COUNTS |= {name: {"val": 6, "test": 6} for name in ("nextqa", "nextgqa", "activitynet_captions")}
COUNTS |= {"mlvu_generation": {"dev": 2}, "timelens": {"charades": 6, "activitynet": 6, "qvhighlights": 6}}
GROUNDING = ("charades_sta", "activitynet_captions", "qvhighlights", "timelens")


@pytest.mark.parametrize("name", WRITERS)
def test_defaults_read_the_authors_files_and_every_sample_has_frames(here, name):
    found = build(name)
    numbers = (1, 3) if name == "mvbench" else (3, 4, 5)
    assert {split: len(dataset) for split, dataset in found.items()} == COUNTS.get(name, {"test": 6})
    for dataset in found.values():
        for row, sample in zip(dataset.annotation, map(dataset.__getitem__, range(len(dataset))), strict=True):
            assert sample["frames"].shape[0] >= 2 and sample["frames"].shape[1:] == (3, 64, 64)
            assert sample["text_output"] == (row["answer"] or "") and bool(row["answer"]) == (name not in GROUNDING)
            assert sample["moments_s"] == row.get("moments_s", []) and sample["categories"] == row.get("categories", {})
            if name in (*GROUNDING, "nextgqa", "cgbench", "lvbench"):
                assert row["span_s"] in row["moments_s"] and sample["gold_span"][0] >= 0
            assert sample["options"] == row.get("options", [])
            if sample["options"]:
                assert row["answer"] in sample["options"] and len(sample["options"]) in numbers


def test_gold_moments_are_learned_where_a_data_set_says_so(here):
    plain, gold = build("qvhighlights")["val"], build("qvhighlights", "spans={val: gold}", "span_weight=0.5")["val"]
    for index in (0, 1):  # one moment, two
        sample, without = gold[index], plain[index]
        assert sample["span"].tolist() == sample["gold_span"].tolist() == without["gold_span"].tolist() != [-1, -1]
        assert without["span"].tolist() == [-1, -1]
        assert (sample["span_weight"].item(), without["span_weight"].item()) == (0.5, 1)
    assert "any_span" not in gold[0] and "any_span" not in plain[1]  # one moment is learned as ever
    both = gold[1]["any_span"].tolist()
    assert len(both) == 2 and gold[1]["span"].tolist() in both and both == sorted(both)
    span = gold[0]["span"].tolist()
    assert gold.collater([gold[0], gold[1]])["any_span"].tolist() == [[span, [-1, -1]], both]
    assert gold.fingerprint() != plain.fingerprint()
    assert gold.collater([gold[0], gold[1]])["span_weight"].tolist() == [0.5, 0.5]
    with pytest.raises(
        AnnotationError, match=r"datasets.lstp_msvd_qa.spans: gold, but question '100' has no gold span"
    ):
        build("msvd_qa", "spans={test: gold}")


def test_lavis_load_dataset_finds_a_benchmark_by_name(here):
    assert len(load_dataset("lstp_activitynet_qa")["test"]) == 6


def test_ids_kinds_and_names_are_the_published_ones(here):
    # of a task whose videos are shown whole, as published
    change(here / "mvbench/json/action_count.json", lambda rows: rows[0].update(start=0.1, end=0.2))
    msvd = build("msvd_qa")["test"].annotation
    assert [row["question_id"] for row in msvd] == [str(100 + i) for i in range(6)]
    assert msvd[0]["video"] == "vid1.avi" and msvd[0]["category"] == "what"
    activitynet = build("activitynet_qa")["test"].annotation
    assert [row["video"] for row in activitynet[::2]] == ["clip-0.mp4", "v_clip-1.mkv", "v_clip-2.mov"]
    assert [row["category"] for row in activitynet[:2]] == ["color", "object"]  # type 4 and 5
    tgif = build("tgif_qa")["test"].annotation
    assert tgif[1]["question_id"] == "FRAMEQA1" and tgif[1]["video"] == "tumblr_0_250.gif"
    assert [row["category"] for row in tgif[:2]] == ["color", "object"]
    nextqa = build("nextqa")["val"].annotation
    assert nextqa[3]["question_id"] == "4001_1" and nextqa[3]["video"] == "0101/4001.mp4"
    assert (
        nextqa[3]["categories"] == {"type": "TN", "group": "T"}
        and nextqa[3]["category"] == "TN"
        and len(nextqa[3]["options"]) == 5
    )
    star = build("star")["val"].annotation
    assert star[0]["category"] == "Interaction" and star[0]["clip_s"] == [0.1, 0.6] and len(star[0]["options"]) == 4
    egoschema = build("egoschema")["subset"].annotation
    assert [row["question_id"] for row in egoschema] == ["uid-0", "uid-2"]
    mvbench = {row["category"]: row for row in build("mvbench")["test"].annotation}
    assert list(mvbench) == list(MVBENCH) and len(MVBENCH) == 20
    assert [task for task, row in mvbench.items() if "clip_s" in row] == [t for t, f in MVBENCH.items() if f["bounded"]]
    assert mvbench["episodic_reasoning"]["video"] == "tvqa/frames_fps3_hq/clip"
    assert mvbench["action_antonym"]["question_id"] == "action_antonym/0"


def test_the_new_benchmarks_say_what_their_authors_files_say(here):
    videomme = build("videomme")["test"].annotation
    assert videomme[0]["answer"] in videomme[0]["options"] and not videomme[0]["options"][0].startswith("A.")
    kinds = {"duration": "short", "domain": "Knowledge", "sub_category": "Geography", "task": "Object Recognition"}
    assert videomme[0]["categories"] == kinds and videomme[0]["category"] == "short"
    storage = "build_info.annotations.test.storage=inputs/videomme/questions.json"
    for row in (here / "videomme/data").iterdir():  # the authors' JSON names videos by number
        row.rename(row.with_stem(f"{int(row.stem[-1]):03d}"))
    assert answers(build("videomme", "form=json", storage)["test"]) == answers(SimpleNamespace(annotation=videomme))
    whole = answers(build("longvideobench")["val"])
    parquet = "build_info.annotations.val.storage=inputs/longvideobench/validation-00000-of-00001.parquet"
    assert answers(build("longvideobench", "form=parquet", parquet)["val"]) == whole
    lvbench = build("lvbench")["test"].annotation
    assert lvbench[2]["categories"] == {"type": "cartoon", "ability": ["entity recognition", "reasoning"]}
    assert len(lvbench[2]["options"]) == 4 and "(A)" not in lvbench[2]["question"] and lvbench[2]["span_s"] == [0, 1]
    cgbench = build("cgbench")["mini"].annotation
    assert cgbench[1]["moments_s"] == [[0, 0.5], [0.75, 1]] and cgbench[1]["span_s"] == [0, 0.5]
    assert build("charades_sta")["test"].annotation[0]["question"] == "a red appears."
    assert build("timelens")["activitynet"].annotation[0]["video"] == "activitynet/clip-0.mp4"


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "said"),
    [
        ("charades_sta", "charades_sta_test.txt", "0.1 0.6##", "0.6 0.1##", "'moment' must be .* start < end, got"),
        ("charades_sta", "charades_sta_test.txt", "##", "#", "line 1: expected 'VIDEO START END##SENTENCE'"),
        ("qvhighlights", "highlight_val_release.jsonl", "[0.75, 1]", "[0.25, 1]", "overlap"),
        ("qvhighlights", "highlight_val_release.jsonl", "[0.75, 1]", "[0.75, 9]", "ends behind its video of 1 s"),
        (
            "qvhighlights",
            "highlight_val_release.jsonl",
            '"relevant_windows": [[0, 0.5]]',
            '"x": 0',
            "3 of 6 .* no moment",
        ),
        ("lvbench", "video_info.meta.jsonl", "00:00-00:01", "soon", "'time_reference' must be MM:SS-MM:SS .* 'soon'"),
        ("lvbench", "video_info.meta.jsonl", "00:00-00:01", "100:28-101:05", "6065.0. ends behind its video of 2 s"),
        ("lvbench", "video_info.meta.jsonl", "00:00-00:01", "9" * 5000 + ":00", "line 1, qa 0: 'time_reference' must"),
        ("videomme", "questions.json", '"A. ', '"', "must begin with their letters"),
        ("videomme", "questions.json", '"answer": "', '"answer": "Z', "must be the letter of an option, A to D, got"),
        (
            "lvbench",
            "video_info.meta.jsonl",
            '"duration_minutes": ',
            '"duration_minutes": "2", "x": ',
            "length must be",
        ),
        ("timelens", "charades-timelens.json", '"duration": 2.0', '"duration": [2]', "length must be a number"),
        ("cgbench", "cgbench_mini.json", '"clue_intervals": [', '"clue_intervals": [null, ', "has null in place of"),
        (
            "cgbench",
            "cgbench_mini.json",
            '"choices": [',
            '"choices": [null, ',
            "an option of 'choices' is null; write its",
        ),
        (
            "cgbench",
            "cgbench_mini.json",
            '"choices": [',
            '"choices": [["x"], ',
            "must be a text or a number, got .'x'.",
        ),
        (
            "mvbench",
            "json/action_count.json",
            '"candidates": [',
            '"candidates": [null, ',
            "an option of 'candidates' is null",
        ),
        ("star", "STAR_val.json", '"choice": ', '"Choice": ', "'choices': key 'choice' is missing; it has choice_id"),
        ("timelens", "charades-timelens.json", '"queries": [', '"queries": ["more", ', "must be lists of one length"),
    ],
)
def test_what_a_new_benchmark_cannot_say_is_refused_in_a_line(here, name, file, old, new, said):
    path = here / name / file
    write_json(path, json.loads(path.read_text()), indent=None) if path.suffix == ".json" else None
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    options = ["form=json", f"build_info.annotations.test.storage=inputs/{name}/{file}"] if name == "videomme" else []
    with pytest.raises(AnnotationError, match=said) as caught:
        build(name, *options)
    assert file in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "moment"),
    [
        ("00:15-00:19", [15, 19]),
        ("101:21-101:21", [6081, 6082]),  # an instant, 250 of the real file's
        ("00:00-100:28", [0, 6028]),  # minutes of three digits, 38
        ("1:01:05-1:01:10.5", [3665, 3670.5]),
        ("33:52-33:46", None),
        ("08:17-None", None),
        ("None-None", None),
    ],
)
def test_the_times_of_lvbench_are_read_as_they_are_written(here, caplog, said, moment):
    path = here / "lvbench/video_info.meta.jsonl"
    path.write_text(path.read_text().replace("00:00-00:01", said, 1).replace('"duration_minutes": ', '"x": '))
    rows = build("lvbench")["test"].annotation
    assert rows[0].get("moments_s") == (moment and [moment]) and rows[1]["moments_s"] == [[0, 1]]
    assert ("1 of 6 questions have no gold moment" in caplog.text) == (moment is None)


@pytest.mark.parametrize(("answer", "text"), [(2.0, "2"), (1e3, "1000"), (2, "2"), (0.5, "0.5"), ("2.0", "2.0")])
def test_a_whole_number_is_written_as_people_write_it(here, answer, text):
    """pandas makes 2.0 of 2 where a row of the column has none."""
    path = next((here / "msvd_qa").rglob("test*.json"))
    change(path, lambda rows: rows[0].update(answer=answer))
    assert build("msvd_qa")["test"].annotation[0]["answer"] == text


def test_a_number_of_minus_one_is_a_hidden_answer(here, caplog):
    """As in LongVideoBench's test split."""
    path = here / "longvideobench/lvb_val.json"
    change(path, lambda rows: [row.update(correct_choice=-1) for row in rows] and [row.pop("level") for row in rows])
    rows = build("longvideobench")["val"].annotation
    assert {row["answer"] for row in rows} == {None} and "6 questions have no answers" in caplog.text
    assert set(rows[0]["categories"]) == {"duration", "category", "topic"}  # parquet has no level
    change(path, lambda rows: rows[0].update(correct_choice=0))
    with pytest.raises(AnnotationError, match="5 of 6 questions have no answer"):
        build("longvideobench")


def test_one_option_alone_is_asked_where_the_authors_count_it(here):
    rows = {row["category"]: row for row in build("mvbench")["test"].annotation}
    assert rows["counterfactual_inference"]["options"] == [rows["counterfactual_inference"]["answer"]]
    change(here / "mlvu/json/3_ego.json", lambda rows: rows[0].update(candidates=[rows[0]["answer"]]))
    with pytest.raises(AnnotationError, match="'options' must be 2 or more texts"):
        build("mlvu")


def test_a_parquet_of_other_columns_or_of_none_is_refused(here):
    path = here / "videomme/test-00000-of-00001.parquet"
    other = "build_info.annotations.test.storage=inputs/longvideobench/validation-00000-of-00001.parquet"
    with pytest.raises(AnnotationError, match=r"parquet, row 0: key 'question_id' is missing; it has video_id"):
        build("videomme", other)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AnnotationError, match="parquet: cannot be read as parquet"):
        build("videomme")


def test_reversed_moments_are_left_out_of_training_alone(here, caplog):
    path = here / "charades_sta/charades_sta_test.txt"
    path.write_text("VID0 8.0 7.0##person is holding medicine.\n" + path.read_text())
    info = "build_info.annotations"
    with caplog.at_level(logging.WARNING):
        train = build(
            "charades_sta", f"{info}={{train: {{storage: inputs/charades_sta/charades_sta_test.txt}}, test: null}}"
        )
    assert (
        len(train["train"]) == 6
        and "1 moments do not end after they begin and are left out, first 'VID0/0'" in caplog.text
    )


def test_a_description_with_a_key_that_nobody_reads_is_refused():
    form = {"question_id": "{id}", "video": "{v}", "option": "x"}
    with pytest.raises(ConfigError, match=r"x.yaml: unknown key of benchmark.forms.a 'option'; did you mean 'options'"):
        described({"forms": {"a": form}}, "x.yaml")
    with pytest.raises(ConfigError, match="answer_is 'leter'; did you mean 'letter'"):
        described({"forms": {"a": {"question_id": "{id}", "video": "{v}", "answer_is": "leter"}}}, "x.yaml")


def test_the_form_of_question_and_answer_files_is_joined_by_id(here):
    """The same questions in the form that Video-ChatGPT brought MSVD-QA into; the answers lie in another order."""
    rows = json.loads((here / "msvd_qa/test_qa.json").read_text())
    named = [{"video_name": f"vid{r['video_id']}", "question": r["question"], "question_id": r["id"]} for r in rows]
    (here / "msvd_qa/test_q.json").write_text(json.dumps(named))
    given = [{"answer": r["answer"], "question_id": r["id"]} for r in reversed(rows)]
    (here / "msvd_qa/test_a.json").write_text(json.dumps(given))
    info = "build_info"
    form = ["form=questions", f"{info}.annotations.test.storage=inputs/msvd_qa/test_q.json"]
    form += [f"{info}.answers.test.storage=inputs/msvd_qa/test_a.json"]
    assert answers(build("msvd_qa", *form)["test"]) == answers(build("msvd_qa")["test"])
    with pytest.raises(
        AnnotationError, match=r"key 'question_id' is missing; .* read as datasets.lstp_msvd_qa.form: questions"
    ):
        build("msvd_qa", "form=questions")
    with pytest.raises(AnnotationError, match="key 'id' is missing.* read as datasets.lstp_msvd_qa.form: authors"):
        build("msvd_qa", *form[1:])
    with pytest.raises(ConfigError, match=r"unknown datasets.lstp_msvd_qa.form 'question'; did you mean 'questions'"):
        build("msvd_qa", "form=question")


def test_videos_under_their_old_names_are_found_by_the_mapping(here):
    folder = here / "msvd_qa"
    old = {f"vid{i}": f"aB-{i}_5_15" for i in (1, 2, 3)}
    for name, other in old.items():
        (folder / f"videos/{name}.avi").rename(folder / f"videos/{other}.avi")
    (folder / "youtube_mapping.txt").write_text("".join(f"{other} {name}\n" for name, other in old.items()))
    with pytest.raises(VideoError, match=r"vid1.mp4: no such file"):
        build("msvd_qa")
    names = "build_info.videos.names=inputs/msvd_qa/youtube_mapping.txt"
    assert build("msvd_qa", names)["test"].annotation[0]["video"] == "aB-1_5_15.avi"


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda rows: rows.pop(), r"1 questions have no answer here \(v_clip-0_0\) and 0 answers no question \(none\)"),
        (lambda rows: rows[0].update(question_id="v_x"), r"1 questions .* \(v_clip-2_1\) and 1 answers .* \(v_x\)"),
        (
            lambda rows: rows.append({"answer": "no", "question_id": "v_x"}),
            r"0 questions .* and 1 answers no question \(v_x\)",
        ),
        (lambda rows: rows[0].pop("question_id"), "test_a.json, entry 0: key 'question_id' is missing"),
        (lambda rows: rows[0].update(rows[1]), "entry 1: question id 'v_clip-2_0' occurs twice"),
    ],
)
def test_answers_that_do_not_belong_to_the_questions_are_refused(here, edit, said):
    change(here / "activitynet_qa/test_a.json", edit)
    with pytest.raises(AnnotationError, match=said):
        build("activitynet_qa")


def test_wrong_rows_say_where(here):
    change(here / "egoschema/subset_answers.json", lambda answers: answers.update({"uid-0": 5}))
    with pytest.raises(AnnotationError, match="entry 0: 'answer' must be the number of an option, 0 to 4, got 5"):
        build("egoschema")
    change(here / "star/STAR_val.json", lambda rows: rows[2].update(answer="The sun."))
    with pytest.raises(AnnotationError, match="entry 2: the answer 'The sun.' is none of the options"):
        build("star")
    change(here / "star/STAR_val.json", lambda rows: rows[2].pop("answer"))
    with pytest.raises(AnnotationError, match="1 of 6 questions have no answer: Interaction_T1_2"):
        build("star")
    change(here / "msrvtt_qa/test_qa.json", lambda rows: rows[1].update(id=100))
    with pytest.raises(AnnotationError, match="entry 1: question id '100' occurs twice"):
        build("msrvtt_qa")
    change(here / "msvd_qa/test_qa.json", lambda rows: rows[1].update(answer=" "))
    with pytest.raises(AnnotationError, match="1 of 6 questions have no answer: 101"):
        build("msvd_qa")
    change(here / "msvd_qa/test_qa.json", lambda rows: rows[1].update(answer=["red"]))
    with pytest.raises(AnnotationError, match=r"entry 1: 'answer' must be a text or a number, got \['red'\]"):
        build("msvd_qa")
    change(here / "msvd_qa/test_qa.json", lambda rows: rows[1].update(answer="red", question="what \ud83d?"))
    with pytest.raises(AnnotationError, match="test_qa.json, file, entry 1, key 'question': half a character"):
        build("msvd_qa")
    (here / "mvbench/json/state_change.json").unlink()
    with pytest.raises(AnnotationError, match="lacks 1 of 20 files, first state_change.json"):
        build("mvbench")
    shutil.rmtree(here / "mvbench/json")
    with pytest.raises(AnnotationError, match="mvbench/json: no such annotation file"):
        build("mvbench")
    with pytest.raises(ConfigError, match=r"build_info.answers\) 'tset'; did you mean 'test'"):
        build("activitynet_qa", "build_info.answers.tset.storage=x")


def test_single_tasks_of_mvbench_may_be_named(here):
    storage = "build_info.annotations.test.storage=[inputs/mvbench/json/action_count.json]"
    assert [row["category"] for row in build("mvbench", storage)["test"].annotation] == ["action_count"]


def test_questions_without_a_right_option_are_counted(here, caplog, monkeypatch):
    form = BENCHMARKS["lstp_mlvu"].forms["authors"]
    changed = dataclasses.replace(form, left_out=["3_ego/0", "3_ego/7"])
    monkeypatch.setitem(BENCHMARKS["lstp_mlvu"].forms, "authors", changed)
    dataset = build("mlvu")["dev"]
    assert dataset.unanswerable == ["3_ego/0"] and "3_ego/0" not in dataset.question_ids() and len(dataset) == 6
    assert "1 of 7 questions have no right option; they are not asked, and the score says partial" in caplog.text


def test_hidden_answers_are_none_and_said(here, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = build("star", "build_info.annotations={test: {storage: inputs/star/STAR_test.json}}")["test"]
    assert {row["answer"] for row in dataset.annotation} == {None} and dataset[0]["text_output"] == ""
    assert "the 6 questions have no answers; predictions are written, not scored" in caplog.text
    assert "split test has 6 questions, published are 7377" in caplog.text


def test_a_split_of_the_published_size_is_not_remarked_upon(here, caplog, monkeypatch):
    monkeypatch.setitem(BENCHMARKS["lstp_tgif_qa"].sizes, "test", 6)
    with caplog.at_level(logging.WARNING):
        build("tgif_qa")
    assert "published are" not in caplog.text


def test_a_missing_video_is_named_and_may_stay_open(here, caplog):
    (here / "tgif_qa/gifs/tumblr_1_250.gif").unlink()
    with pytest.raises(VideoError, match=r"tumblr_1_250.mp4: no such file, needed by question 'FRAMEQA2'"):
        build("tgif_qa")
    dataset = build("tgif_qa", "max_bad_fraction=0.4")["test"]
    assert [dataset[i] is None for i in range(6)] == [False, False, True, True, False, False]
    gone = sorted((here / "tgif_qa/gifs").iterdir())
    for gif in gone:
        gif.unlink()
    with pytest.raises(VideoError, match=r"3 of 3 files are missing"):
        build("tgif_qa")
    (listed,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert all(gif.stem in listed for gif in gone) and listed.count("\n") == 3


def test_the_document_has_the_sizes_of_the_table():
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for name, benchmark in BENCHMARKS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert set(benchmark.sizes.values()) == {int(n.replace(",", "")) for n in re.findall(r"\d[\d,]{2,}", line)}


def test_the_tool_writes_what_it_is_asked_for(tmp_path, capsys):
    assert tiny_benchmarks.main([str(tmp_path), "--only", "egoschema"]) == 0
    assert "egoschema" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "inputs").iterdir()} == {"egoschema"}
    with pytest.raises(ConfigError, match="unknown benchmark 'egoshema'; did you mean 'egoschema'"):
        write_benchmarks(tmp_path, ["egoshema"])


def test_quotes_are_text_where_tabs_part_the_cells(tmp_path):
    path = tmp_path / "Test_frameqa_question.csv"
    path.write_text(
        'gif_name\tquestion\tanswer\ttype\tvid_id\tkey\tdescription\ng\twhat is "it ?\ta "cat\t0\tF1\t1\td\n'
    )
    (row,) = read_benchmark(BENCHMARKS["lstp_tgif_qa"], [path], tmp_path)
    assert (row["question"], row["answer"], row["category"]) == ('what is "it ?', 'a "cat', "object")


@pytest.mark.parametrize("begin", ["", "\ufeff", "sep=;\n", "sep=;\r\n"])
def test_a_table_whose_cells_semicolons_part_is_read(tmp_path, begin):
    """Excel writes it in countries that write 1,5; a cell with a semicolon or a line break stands in quotes."""
    path = tmp_path / "val.csv"
    asked = 'why; or\n"so", he says'
    rows = [["1", "2", asked, "0", "5", "CW", "a, b", "c", "d", "e", "f"], ["1", "2", "how?", "1", "6", "CW", *"abcde"]]
    text = io.StringIO()
    names = ["video", "frame_count", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3", "a4"]
    csv.writer(text, delimiter=";").writerows([names, *rows])
    path.write_text(begin + text.getvalue(), encoding="utf-8", newline="")
    found = read_benchmark(BENCHMARKS["lstp_nextqa"], [path], tmp_path)
    assert [row["question"] for row in found] == [asked, "how?"] and found[0]["options"][0] == "a, b"
    path.write_text(begin + text.getvalue() + '1;2;"oh', encoding="utf-8", newline="")
    line = 6 if begin.startswith("sep") else 5
    with pytest.raises(AnnotationError, match=f"val.csv, line {line}: cannot be read as a table"):
        read_benchmark(BENCHMARKS["lstp_nextqa"], [path], tmp_path)


@pytest.mark.parametrize("cells", ["1,2,why,5,0,CW,3,a,b,c,d,e,and f", "1,2,why,5,0,CW,3,a,b,c,d"])
def test_a_row_of_another_width_is_refused(tmp_path, cells):
    path = tmp_path / "val.csv"
    path.write_text(f"video,frame_count,question,answer,qid,type,width,a0,a1,a2,a3,a4\n{cells}\n")
    with pytest.raises(AnnotationError, match="val.csv, line 2: expected 12 cells, as in the first line"):
        read_benchmark(BENCHMARKS["lstp_nextqa"], [path], tmp_path)


NEXTQA = "video,question,answer,qid,type,a0,a1,a2,a3,a4"


def table(path: Path, *rows: str, header: str = NEXTQA) -> list:
    path.write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return read_benchmark(BENCHMARKS["lstp_nextqa"], [path], path.parent)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["v,why,0,0,CW,a,b,c,d,e", 'v,why,1,1,CW,a,b,c,d,"e', "v,why,1,2,CW,a,b,c,d,e"], "line 3: .* end of data"),
        (['v,"why" they say,0,0,CW,a,b,c,d,e'], "line 2: cannot be read as a table"),
        ([f"v,{'x' * 200_000},0,0,CW,a,b,c,d,e"], "line 2: .*field larger than"),
        (["v,why,0,,CW,a,b,c,d,e"], "line 2: 'qid' is empty"),
    ],
)
def test_no_cell_of_a_table_swallows_others(tmp_path, rows, said):
    with pytest.raises(AnnotationError, match=said):
        table(tmp_path / "val.csv", *rows)
    with pytest.raises(AnnotationError, match="two columns have the name 'a0'"):
        table(tmp_path / "val.csv", "v,why,0,0,CW,a,b,c,d,e", header=NEXTQA.replace("a1", "a0"))


def test_endings_of_files_may_be_in_capitals(tmp_path):
    (tmp_path / "v.MP4").touch()
    (row,) = table(tmp_path / "VAL.CSV", "v,why,1,0,CW,a,b,c,d,e")
    assert (row["video"], row["answer"]) == ("v.MP4", "b")


def test_an_empty_cell_of_a_parquet_file_is_no_text(tmp_path):
    """pandas writes NaN for it, and turns whole numbers beside it into floats."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    form = BENCHMARKS["lstp_longvideobench"].forms["parquet"]
    columns = dict.fromkeys([*form.columns, "duration_group", "question_category"], "x")
    columns |= {"question": "?", "option3": "d", "option4": None, "correct_choice": 1.0}

    def read(**changes):
        parquet.write_table(
            pyarrow.table({key: [one] for key, one in (columns | changes).items()}), tmp_path / "a.parquet"
        )
        return read_benchmark(BENCHMARKS["lstp_longvideobench"], [tmp_path / "a.parquet"], tmp_path, form="parquet")[0]

    assert read()["options"] == ["x", "x", "x", "d"] and read()["answer"] == "x"
    assert read(option4=math.nan)["options"] == ["x", "x", "x", "d"]
    assert read(correct_choice=math.nan)["answer"] is None
    for column, said in (
        ("id", "'id' is empty"),
        ("video_path", "'video_path' is empty"),
        ("option1", "an option before"),
    ):
        with pytest.raises(AnnotationError, match=f"row 0: {said}"):
            read(**{column: math.nan})
    with pytest.raises(AnnotationError, match="row 0: 'question' is empty"):
        read(question=" ")
    assert read(id=7.0)["question_id"] == "7" and read(id=7.5)["question_id"] == "7.5"


def test_a_line_of_json_may_hold_other_ends_of_lines(tmp_path):
    path = tmp_path / "test_qa.json"
    rows = [{"id": n, "video_id": 1, "question": "two\u2028lines\u0085?", "answer": "yes"} for n in range(2)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = read_benchmark(BENCHMARKS["lstp_msvd_qa"], [path], tmp_path)
    assert [row["question"] for row in found] == ["two\u2028lines\u0085?"] * 2


# ---- subtitles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split", "said"),
    [("videomme", "test", "line 0 of"), ("longvideobench", "val", "a line of")],
)
def test_subtitles_are_those_of_the_video_and_off_by_default(here, name, split, said):
    pytest.importorskip("pyarrow") if name == "videomme" else None
    plain, shown = build(name)[split], build(name, "subtitles=frames", "subtitles_window_s=0.5")[split]
    assert "subtitles" not in plain[0] and "subtitles" not in plain.collater([plain[0]])
    assert "subtitles" not in plain.annotation[0], "what the entries say is as it was"
    texts = [[line.text for line in shown[i]["subtitles"]] for i in range(len(shown))]
    for row, own in zip(shown.annotation, texts, strict=True):
        assert not own or own[0].startswith(said) and own[0].endswith(row["video_id"])
    assert any(texts)
    batch = shown.collater([shown[0], shown[1]])
    assert batch["subtitles_window_s"] == [0.5, 0.5] and len(batch["subtitles"]) == 2
    assert len({one.fingerprint() for one in (plain, shown, build(name, "subtitles=whole")[split])}) == 3


AS_JSON = ("form=json", "build_info.annotations.test.storage=inputs/videomme/questions.json")


def test_subtitles_that_cannot_be_read_stop_the_run_in_one_line(here):
    (first, *_) = sorted((here / "longvideobench" / "subtitles").iterdir())
    first.write_text('[{"line": "never"}]')
    with pytest.raises(AnnotationError, match=rf"{re.escape(first.name)}, subtitle 0: has no times"):
        build("longvideobench", "subtitles=whole")
    build("longvideobench")
    shutil.rmtree(here / "videomme" / "subtitle")
    with pytest.raises(ConfigError, match="build_info.subtitles.storage: no such folder: inputs/videomme/subtitle"):
        build("videomme", "subtitles=frames", *AS_JSON)
    with pytest.raises(ConfigError, match="subtitles"):
        build("videomme", "subtitles=some")


# ---- in shards ----------------------------------------------------------------------------------------------------


def pack_benchmark(name: str, *more: str) -> tuple[str, list[str]]:
    """Packs the first split to be tested to shards/; returns it, and the options by which its builder reads those."""
    config = Config(SimpleNamespace(cfg_path=f"projects/lstp/eval/{name}_lstp_tiny.yaml", options=[])).config
    split = config.run.test_splits[0]
    info = config.datasets[f"lstp_{name}"].build_info
    words = ["pack", f"shards/{name}", info.annotations[split].storage, "--from", f"lstp_{name}", *more]
    words += ["--root", info.videos.storage, "--workers", "1", "--max-count", "2"]
    if info.answers.get(split):
        words += ["--answers", info.answers[split].storage]
    if info.videos.names:
        words += ["--video-names", info.videos.names]
    assert tools(words) == 0
    count = len(list(Path("shards").glob(f"{name}-*.tar")))
    storage = f"shards/{name}-{{000000..{count - 1:06d}}}.tar"
    return split, [f"build_info.annotations.{split}.storage={storage}", "build_info.answers={}"]


@pytest.mark.parametrize("name", WRITERS)
def test_shards_of_a_benchmark_give_its_samples(here, name):
    """Packed from the authors' files, then read by the same builder: options, clips, kinds and frames stay."""
    split, storage = pack_benchmark(name)
    whole, packed = build(name)[split], build(name, *storage)[split]
    assert len(packed) == len(whole)
    samples = {sample["question_id"]: sample for sample in map(packed.__getitem__, range(len(packed)))}
    for sample in map(whole.__getitem__, range(len(whole))):
        other = samples[sample["question_id"]]
        assert sample.keys() == other.keys()
        for key in sample.keys() - {"media"}:
            same = torch.equal if torch.is_tensor(sample[key]) else lambda a, b: a == b
            assert same(sample[key], other[key]), key
    assert sorted(map(len, packed.eval_groups())) == sorted(map(len, whole.eval_groups()))
    assert any(row.get("clip_s") for row in packed.annotation) == (name in ("star", "mvbench"))


@pytest.mark.parametrize("loader", ["offsets", "stream"])
def test_subtitles_are_packed_with_their_videos(here, loader):
    """With the place where a video begins in its file taken off; extracted, they are read as they were."""
    file = here / "longvideobench" / "lvb_val.json"
    change(file, lambda rows: [row.update(starting_timestamp_for_subtitles=0.25) for row in rows])
    split, storage = pack_benchmark("longvideobench", "--subtitles", "inputs/longvideobench/subtitles")
    storage += [f"shards.loader={loader}"]
    shown = "subtitles=frames"
    whole, packed = build("longvideobench", shown)[split], build("longvideobench", shown, *storage)[split]
    lines = {sample["question_id"]: sample["subtitles"] for sample in map(whole.__getitem__, range(len(whole)))}
    assert {sample["question_id"]: sample["subtitles"] for sample in map(packed.__getitem__, range(6))} == lines
    assert {(line.start_s, line.end_s) for own in lines.values() for line in own} == {(0.0, 0.75)}
    assert "subtitles" not in build("longvideobench", *storage)[split][0]
    tars = sorted(map(str, Path("shards").glob("*.tar")))
    assert tools(["verify", *tars]) == 0 and tools(["extract", *tars, "--out", "out"]) == 0
    assert read_subtitles(Path("out/clip-0.json")) == lines[whole[0]["question_id"]]


def test_shards_without_subtitles_and_with_damaged_ones_are_one_line(here):
    split, storage = pack_benchmark("longvideobench")
    with pytest.raises(ConfigError, match="its shard holds no subtitles; pack the set with --subtitles FOLDER"):
        build("longvideobench", "subtitles=whole", *storage)
    wrong = (b'"version":1', b'"subtitles":[{"text":"x"}],"version":1')
    for tar in Path("shards").glob("*.tar"):
        rewritten(tar, lambda key, members: {**members, "json": members["json"].replace(*wrong)})
        tar.with_suffix(".index").unlink()
    Path("shards/longvideobench.manifest.json").unlink()
    with pytest.raises(ShardError, match="subtitles, subtitle 0: has no times"):
        build("longvideobench", "subtitles=whole", *storage)


def test_a_folder_of_pictures_is_a_video_in_shards_too(here, tmp_path, capsys):
    """Every picture byte for byte, checked, written back, packed again to the same bytes, and shown."""
    _, storage = pack_benchmark("mvbench")
    found = tools(["verify", "--json", *sorted(map(str, Path("shards").glob("*.tar"))), "--workers", "1"])
    assert found == 0, capsys.readouterr().out
    shards = storage[0].partition("=")[2]
    assert tools(["extract", shards, "--out", "back"]) == 0
    folder = "tvqa/frames_fps3_hq/clip"
    before = {p.name: p.read_bytes() for p in (here / "mvbench/video" / folder).iterdir()}
    assert {p.name: p.read_bytes() for p in Path("back", folder).iterdir()} == before and len(before) > 3
    assert tools(["pack", "again/mvbench", "back/annotation.json", "--max-count", "2", "--workers", "1"]) == 0
    for path in Path("shards").iterdir():
        assert path.read_bytes() == Path("again", path.name).read_bytes(), path.name
    assert tools(["preview", shards, "--out", "sheet.png", "--count", "20", "--size", "32"]) == 0
    assert tools(["flow", shards, "--out", "flow/x", "--num-frames", "4", "--size", "64", "--workers", "1"]) == 0
    damaged = next(path for path in sorted(Path("shards").glob("*.tar")) if b"frames_fps3" in path.read_bytes())
    rewritten(damaged, lambda key, members: {name: other_picture(name, raw) for name, raw in members.items()})
    assert tools(["verify", str(damaged), "--workers", "1"]) == 1
    assert "the SHA-256 of its pictures is not that of its json" in capsys.readouterr().out


def other_picture(name: str, raw: bytes) -> bytes:
    if name != "frames":
        return raw
    stored = parse_frames(raw, "x")
    return dump_frames(stored._replace(pictures=[stored.pictures[1], *stored.pictures[1:]]))


def test_questions_about_parts_of_videos_refuse_frames_and_flow_of_the_whole(here, capsys):
    with pytest.raises(AssertionError):
        pack_benchmark("star", "--frames", "4")
    assert "are about a part of it (clip_s)" in capsys.readouterr().err
    split, storage = pack_benchmark("star")
    shards = storage[0].partition("=")[2]
    assert tools(["flow", shards, "--out", "flow/star", "--num-frames", "4", "--size", "64", "--workers", "1"]) == 0
    dataset = build("star", *storage, "flow=precomputed", f"shards.flow={shards.replace('shards/', 'flow/')}")[split]
    with pytest.raises(ConfigError, match="precomputed is of whole videos"):
        dataset[0]


@pytest.mark.parametrize("name", ["tgif_qa", "mvbench"])
def test_evaluation_over_shards_answers_as_over_files(here, name):
    """GIFs and folders of pictures, through `lavis.evaluate`."""
    split, storage = pack_benchmark(name)
    command = ["--cfg-path", f"projects/lstp/eval/{name}_lstp_tiny.yaml", "--options", "model.checkpoint=null"]
    command += [f"datasets.lstp_{name}.flow=none", "model.flow.name=dis"]  # neither has motion vectors
    rows = []
    for out, more in (("files", []), ("shards", [f"datasets.lstp_{name}.{option}" for option in storage])):
        assert evaluate.main([*command, f"run.output_dir={out}", *more]) == 0
        rows.append(sorted(Path(out, f"result/{split}_video_qa.jsonl").read_text(encoding="utf-8").splitlines()))
    assert [drop_times(row) for row in rows[0]] == [drop_times(row) for row in rows[1]] and len(rows[0]) > 4


def drop_times(line: str) -> dict:
    return {key: value for key, value in json.loads(line).items() if "time" not in key or key == "frame_times"}


@pytest.mark.parametrize(
    "text",
    [
        '{"answer": "a man\u2028a dog", "question_id": "q0"}\n{"answer": "b", "question_id": "q1"}\n',
        '\n{"question_id": "q0", "answer": "a man\u2028a dog"}\n{"question_id": "q1", "answer": "b"}\n',
        '{\n  "question_id": "q0",\n  "answer": "a man\u2028a dog"\n}\n',
        '{"q0": "a man\u2028a dog"}',
        '{\n  "q0": "a man\u2028a dog"\n}',
    ],
)
def test_answers_are_told_from_rows_however_they_are_laid_out(tmp_path, text):
    (tmp_path / "answers.json").write_text(text, encoding="utf-8")
    read = read_answers(tmp_path / "answers.json")
    assert read["q0"]["answer"] == "a man\u2028a dog" and set(read) <= {"q0", "q1"}
