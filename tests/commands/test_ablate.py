"""One command for "does the sampler help?": what is evaluated for each row, and what the table says of it."""

from __future__ import annotations

import contextlib
import json
from math import comb
from pathlib import Path

import lavis_tiny
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lavis_lstp.commands import ablate, chain, cli
from lavis_lstp.config.model import SELECTORS
from lavis_lstp.errors import ConfigError, CoverageError
from lavis_lstp.files import read_jsonl, write_json, write_jsonl
from lavis_lstp.host import evaluate
from lavis_lstp.models.where.chooser import Chooser
from lavis_lstp.models.where.frame_selector import build_selector
from lavis_lstp.report import table
from lavis_lstp.report.plots import accuracy_plot
from lavis_lstp.testing.tiny_benchmarks import write_benchmarks

SHAPES = "projects/lstp/eval/shapes_qa_lstp_tiny.yaml"


def ways(*names: str) -> dict:
    return {name: ablate.ways_of()[name] for name in names}


def test_each_row_has_its_own_frames_and_the_first_is_what_the_others_are_compared_with():
    cells = ablate.cells_of([SHAPES], ways("uniform", "lstp", "oracle"), [4, 8], [])
    assert [cell.name for cell in cells] == [
        f"shapes_qa_lstp_tiny_{way}_{count}" for count in (4, 8) for way in ("uniform", "lstp", "oracle")
    ]
    by_name = {cell.name.removeprefix("shapes_qa_lstp_tiny_"): cell for cell in cells}
    assert {cell.baseline for cell in cells[3:]} == {"shapes_qa_lstp_tiny_uniform_8"}
    assert by_name["uniform_8"].options == (
        "model.selector.name=uniform",
        "model.selector.num_selected=8",
    )
    assert by_name["lstp_4"].options == ("model.selector.num_selected=4",), "the recipe's own selector and flow"
    assert by_name["oracle_4"].options[:2] == ("model.selector.name=given", "model.selector.span_key=gold_span")
    kept = ablate.cells_of([SHAPES], ways("lstp"), [4], ["model.selector.name=argmax"])
    assert kept[0].options == ("model.selector.num_selected=4",)
    (other,) = ablate.cells_of([SHAPES], ways("lstp"), [4], ["model.selector.name=uniform"])
    assert other.options[0] == "model.selector.name=lstp"


@pytest.mark.parametrize(
    ("way", "option"),
    [("bitcost", "bit_cost=true"), ("motion", "motion_energy=true"), ("keyframes", "frames=keyframe")],
)
def test_what_the_codec_says_is_read_where_it_chooses(way, option):
    cells = ablate.cells_of([SHAPES], ways("uniform", way), [4], [])
    assert cells[1].options[-1] == f"datasets.lstp_shapes.{option}" not in cells[0].options
    if way == "keyframes":
        return
    with pytest.raises(ConfigError, match=f"'{way}' needs samples with '{option.partition('=')[0]}'"):
        Chooser(build_selector(way))(
            {"frame_mask": torch.ones(1, 4), "text_input": ["what?"], "question_id": ["q"], "frames": torch.zeros(1, 4)}
        )


def test_few_kinds_of_questions_have_columns_and_many_have_none():
    row = {"title": "x", "accuracy": 0.5, "interval": [0.4, 0.6], "milliseconds": None, "frames_scored": 600.0}
    few = {kind: {"accuracy": 0.25} for kind in ("60 s", "2 s")}
    head, _, line = table.table_lines([{**row, "by_category": few}], "frames")
    assert head == "| frames | accuracy | 95 % interval | 2 s | 60 s | frames scored |"
    assert line == "| x | 50.0% | 40.0% to 60.0% | 25.0% | 25.0% | 600 |"
    many = {str(kind): {"accuracy": 0.25} for kind in range(9)}
    assert table.table_lines([{**row, "by_category": many}], "frames")[0].count("|") == 5


def test_every_selector_is_a_way_and_a_file_adds_more(tmp_path):
    file = tmp_path / "ways.yaml"
    file.write_text("near: {title: span and its surroundings, model: {selector: {name: lstp, context: 2}}}")
    found = ablate.ways_of(file)
    assert set(SELECTORS) <= set(found) and found["gumbel"].options == ("model.selector.name=gumbel",)
    assert found["near"].options == ("model.selector.name=lstp", "model.selector.context=2")
    for text, said in (
        ("- a", "must have a title"),
        ("a: {title: b}", "'a' must have a title"),
        ("a: [", "not a YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            ablate.ways_of(file)
    with pytest.raises(ConfigError, match="did you mean 'uniform'"):
        ablate.main(["--cfg-path", SHAPES, "--frames", "unifrom"])


def test_a_way_names_the_weights_of_its_scorer(monkeypatch):
    asked = []
    monkeypatch.setattr(ablate, "cells_of", lambda recipes, found, *_: asked.append(found) or [])
    monkeypatch.setattr(ablate, "ablate", lambda *_: [{"compared_with": None, "questions": 0, "title": "x"}])
    monkeypatch.setattr(ablate, "table_lines", lambda *_: [])
    names = ["uniform", "topk:clip=a/b", "aks:itm=blip_image_text_matching/large"]
    assert ablate.main(["--cfg-path", SHAPES, "--methods", *names]) == 0
    assert [*asked[0]] == names
    of_clip, of_lavis = (asked[0][name] for name in names[1:])
    assert of_clip.options == ("model.selector.name=topk", "model.scorer.name=clip", "model.scorer.weights=a/b")
    told = ("name=itm", "arch=blip_image_text_matching", "model_type=large")
    assert of_lavis.options == ("model.selector.name=aks", *(f"model.scorer.{one}" for one in told))
    assert of_lavis.title == "aks, scored by itm=blip_image_text_matching/large"
    cells = [cell.name for cell in CELLS_OF([SHAPES], asked[0], [4], [])]
    assert cells[1].startswith("shapes_qa_lstp_tiny_topk:clip_b_") and not any("/" in name for name in cells)
    with pytest.raises(ConfigError, match="did you mean 'topk:clip"):
        ablate.main(["--cfg-path", SHAPES, "--methods", "topk:clp=a"])


CELLS_OF = ablate.cells_of


def test_laviss_models_have_a_row_of_evenly_spaced_frames_for_each_number():
    recipes = [f"projects/lstp/eval/nextqa_{model}.yaml" for model in ("lstp_vicuna7b", "blip2_t5")]
    cells = ablate.cells_of(recipes, ways("uniform", "lstp"), [2, 4], [])
    assert [cell.name for cell in cells[4:]] == ["nextqa_blip2_t5_uniform_2", "nextqa_blip2_t5_uniform_4"]
    assert cells[5].options == ("datasets.lstp_nextqa.image_frames=4",) and cells[5].split == "val"
    assert cells[0].title == "nextqa_lstp_vicuna7b: evenly spaced, 2 frames"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["run.test_splits=[test,val]"], r"one split in run.test_splits, got video_qa and \['test', 'val'\]"),
        (["run.task=temporal_grounding"], "wants run.task video_qa"),
        (["model.selector.nam=x"], "did you mean 'model.selector.name'"),
    ],
)
def test_what_cannot_be_ablated_is_said_before_anything_runs(options, said):
    with pytest.raises(ConfigError, match=said):
        ablate.cells_of([SHAPES], ways("uniform"), [4], options)
    with pytest.raises(ConfigError, match="--num-frames must be at least 1, got 0"):
        ablate.main(["--cfg-path", SHAPES, "--num-frames", "0"])


def test_the_paired_test_is_exact():
    first = {f"q{i}": i < 3 for i in range(20)}
    second = {f"q{i}": i >= 2 for i in range(20)} | {"other": True}
    # 2 questions only the first has right, 17 only the second; q2 both
    assert table.paired_p(first, second) == pytest.approx(2 * sum(comb(19, k) for k in range(3)) / 2**19)
    assert table.paired_p(first, first) == 1.0


def result(folder: Path, rights: list[bool], **record) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"question_id": f"q{i}", "answer": "a cat", "prediction": "Cat." if right else "dog", **record}
        for i, right in enumerate(rights)
    ]
    write_jsonl(folder / "test_video_qa.jsonl", rows)
    write_json(folder / "test_video_qa_metrics.json", {"coverage": 1.0})
    return folder


def test_a_row_says_what_its_files_say(tmp_path):
    folder = result(tmp_path / "a", [True, True, False, True], span=[0, 2], gold_span=[1, 2])
    times = [{"question_id": f"q{i}", "vision": 0.002, "language": 0.001 * i} for i in range(4)]
    write_jsonl(folder / "test_video_qa_timings.jsonl", times)
    row, right = table.measure(folder, "test_video_qa")
    assert right == {"q0": True, "q1": True, "q2": False, "q3": True}
    assert (row["accuracy"], row["questions"], row["span_iou"]) == (0.75, 4, 0.5)
    assert row["milliseconds"]["vision"] == pytest.approx(2) and row["milliseconds"]["language"] == pytest.approx(1.5)
    (head, _, line) = table.table_lines([{"title": "x", **row, "p_value": None}], "frames")
    assert head.split(" | ")[-2:][0] == "span IoU" and "p, paired" not in head and "unparsable" not in head
    assert line.startswith("| x | 75.0% | 30.1% to 95.4% | 0.50 | 0.0 + 0.0 + 0.0 + 2.0 + 1.5 = 3.5 |")


def test_frames_scored_and_the_time_for_it_are_those_of_any_scorer(tmp_path):
    folder = result(tmp_path / "a", [True, False], num_frames=64, num_scored=12)
    write_jsonl(folder / "test_video_qa_timings.jsonl", [{"question_id": f"q{i}", "scores": 0.003} for i in range(2)])
    row, _ = table.measure(folder, "test_video_qa")
    assert row["frames_scored"] == 12
    (head, _, line) = table.table_lines([{"title": "x", **row}], "frames")
    assert head.endswith("| frames scored | ms per question: flow, sampler, scores, selection, vision, language |")
    assert line.endswith("| 12 | 0.0 + 0.0 + 3.0 + 0.0 + 0.0 + 0.0 = 3.0 |")


def test_choices_count_as_they_were_judged_and_partial_scores_say_so(tmp_path):
    folder = result(tmp_path / "a", [True, False], options=["x", "y"], correct=True)
    write_json(folder / "test_video_qa_metrics.json", {"coverage": 0.5, "num_unparsable": 1})
    row, right = table.measure(folder, "test_video_qa")
    assert list(right.values()) == [True, True] and row["milliseconds"] is None
    lines = table.table_lines([{"title": "x", **row}], "frames")
    assert table.judge_line([row]) == "Judged by: the right option was chosen."
    assert "| unparsable | coverage |" in lines[0] and "| 1 | 50.0% |" in lines[2] and "ms per" not in lines[0]


def test_an_adaptive_number_of_frames_is_a_column_and_a_count_of_the_command(tmp_path):
    folder = result(tmp_path / "a", [True, False])
    write_json(folder / "test_video_qa_metrics.json", {"coverage": 1.0, "frames_per_answer": 5.25})
    row, _ = table.measure(folder, "test_video_qa")
    lines = table.table_lines([{"title": "x", **row}], "frames")
    assert "| frames per answer |" in lines[0] and "| 5.2 |" in lines[2]
    both = [{**row, "series": "x", "frames": count} for count in ("auto", 4)]
    assert accuracy_plot(both) == accuracy_plot(
        [{**one, "frames": count} for one, count in zip(both, (5.25, 4), strict=True)]
    )
    with pytest.raises(ConfigError, match="got many; auto is legal, too"):
        ablate.main(["--cfg-path", SHAPES, "--num-frames", "many"])
    ways = {name: ablate.ways_of()[name] for name in ("lstp", "topk")}
    cells = ablate.cells_of([SHAPES], ways, ["auto", 2], [])
    assert "model.selector.num_selected=auto" in cells[0].options and cells[0].title.endswith("auto frames")
    with pytest.raises(ConfigError, match="auto needs scores, and --frames uniform asks for none"):
        ablate.cells_of([SHAPES], {"uniform": ablate.ways_of()["uniform"]}, ["auto"], [])
    assert len(cells) == 4 and cells[0].name != cells[2].name


def test_nothing_to_score_is_an_error(tmp_path):
    with pytest.raises(CoverageError, match="no question has an answer to compare with"):
        table.measure(result(tmp_path / "a", [True], answer=None), "test_video_qa")


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch) -> list[str]:
    """Evaluations run here; gives the steps that did."""
    ran = []

    def call(whole, output, lock, going_on, warm):
        ran.append(whole)
        with open(output, "a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
            return evaluate.main(whole[whole.index("--cfg-path") :]), False

    monkeypatch.setattr(chain, "_call", call)
    return ran


def test_the_command_evaluates_and_tabulates_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys, in_process):
    monkeypatch.chdir(tmp_path)
    sizes = {"train_videos": 1, "val_videos": 1, "test_videos": 2, "train_images": 1, "size": 64}
    small = [f"datasets.lstp_shapes.generate.{name}={value}" for name, value in sizes.items()]
    small += ["datasets.lstp_shapes.num_frames=8", "model.checkpoint=null", "run.batch_size_eval=4"]
    command = ["ablate", "--cfg-path", SHAPES, "--methods", "uniform", "random", "lstp", "oracle", "--num-frames", "2"]
    command += ["--out", "out", "--options", *small]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert len(in_process) == 4 and "12 questions. p: exact McNemar test against shapes_qa_lstp_tiny_uniform_2" in said
    table = Path("out/table.md").read_text(encoding="utf-8")
    assert table in said and table.count("\n") == 6 + 2
    assert table.endswith("|\n\nJudged by: exact match after normalising, no judge was asked.\n")
    rows = {
        row["name"].split("_")[-2]: row
        for row in json.loads(Path("out/table.json").read_text(encoding="utf-8"))["rows"]
    }
    assert rows["oracle"]["span_iou"] == 1.0 and rows["lstp"]["span_iou"] < 1.0
    assert rows["lstp"]["milliseconds"]["sampler"] > 0 == rows["uniform"]["milliseconds"]["sampler"]
    assert rows["uniform"]["p_value"] is None and 0 < rows["lstp"]["p_value"] <= 1
    records = {way: list(read_jsonl(f"out/shapes_qa_lstp_tiny_{way}_2/result/test_video_qa.jsonl")) for way in rows}
    assert all(record["span"] == record["gold_span"] for record in records["oracle"])
    assert {tuple(record["frame_index"]) for record in records["uniform"]} == {(1, 5)}
    assert [rows[way]["frames_scored"] for way in ("uniform", "lstp", "oracle")] == [0, 8, 0]
    assert {row["frames"] for row in rows.values()} == {2} and rows["lstp"]["series"] == "LSTP (predicted span)"
    assert Image.open("out/accuracy.png").size[0] > 300
    assert len({tuple(record["frame_index"]) for record in records["random"]}) > 1
    assert cli.main(command) == 0 and len(in_process) == 4, "what is done is not done again"


def test_laviss_own_models_stand_in_the_table_on_the_same_questions(tmp_path, capsys, in_process):
    """`arch: blip2_t5` and `blip2_opt`, in evaluations composed of a user's own files. The tiny OPT reads 64 tokens."""
    own = {"image_size": lavis_tiny.IMAGE_SIZE, "flow": "none"}
    theirs = own | {"vis_processor": {"eval": {"name": "blip_image_eval", "image_size": lavis_tiny.IMAGE_SIZE}}}
    said = {"prompt": "Q: {}", "max_len": 3, "num_beams": 1}
    lstp = {"arch": "lstp_tiny", "flow": {"name": "dis"}}
    models: dict = {"lstp_tiny": {"model": lstp, "datasets": {"*": {"image_size": 64, "flow": "none"}}}}
    with lavis_tiny.hub(tmp_path):
        write_benchmarks(tmp_path, ["msvd_qa"])
        for arch in ("blip2_t5", "blip2_opt"):
            models[arch] = {"model": lavis_tiny.config(arch, tmp_path), "datasets": {"*": theirs}, "run": said}
        run = {"task": "video_qa", "test_splits": ["test"], "device": "cpu", "num_workers": 0, "batch_size_eval": 4}
        files = {f"models/{name}": model for name, model in models.items()}
        files["benchmarks/msvd_qa"] = {"datasets": {"lstp_msvd_qa": {"num_frames": 4}}, "run": run}
        for name, content in files.items():
            file = tmp_path / "mine" / f"{name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(content, file)
        recipes = [f"mine/msvd_qa_{name}.yaml" for name in models]
        command = ["ablate", "--cfg-path", *recipes, "--frames", "uniform", "lstp", "--num-frames", "2", "--out", "out"]
        assert cli.main(command) == 0, capsys.readouterr().err
    table = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert [row["title"].removeprefix("msvd_qa_") for row in table] == [
        "lstp_tiny: evenly spaced, 2 frames",
        "lstp_tiny: LSTP (predicted span), 2 frames",
        "blip2_t5: evenly spaced, 2 frames",
        "blip2_opt: evenly spaced, 2 frames",
    ]
    asked = [list(read_jsonl(tmp_path / "out" / row["name"] / "result" / "test_video_qa.jsonl")) for row in table]
    for records in asked[1:]:
        for key in ("question_id", "question", "answer", "video_id"):
            assert [record[key] for record in records] == [record[key] for record in asked[0]]
    assert {row["questions"] for row in table} == {6}
    assert (tmp_path / "out" / "table.md").read_text() in capsys.readouterr().out


def test_an_oracle_needs_gold_spans(tmp_path, monkeypatch, capsys, in_process):
    write_benchmarks(tmp_path, ["star"])
    monkeypatch.chdir(tmp_path)
    options = ["model.checkpoint=null", "datasets.lstp_star.num_frames=4"]
    recipe = "projects/lstp/eval/star_lstp_tiny.yaml"
    command = ["ablate", "--cfg-path", recipe, "--frames", "oracle", "--num-frames", "2", "--options", *options]
    assert cli.main(command) == 2
    assert "selector 'given' needs a span" in capsys.readouterr().err
