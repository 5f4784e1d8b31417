"""projects/lstp/eval/<benchmark>_<model>.yaml: composed of two files, complete for each pair, run on tiny weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lavis_tiny
import pytest
import torch
from video_files import numbered_picture

from lavis_lstp.commands import cli
from lavis_lstp.config import Config, evaluation_parts, evaluations
from lavis_lstp.data.benchmarks import BENCHMARKS
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.errors import ConfigError
from lavis_lstp.files import read_jsonl
from lavis_lstp.host import evaluate
from lavis_lstp.models.answer.lavis_frames import several_frames
from lavis_lstp.testing.tiny_benchmarks import write_benchmarks
from lavis_lstp.testing.tiny_checkpoints import Sizes, size_options, write_all

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("lstp_vicuna7b", "lstp_flant5xl", "lstp_instruct_flant5xl", "lstp_tiny", "blip2_t5", "blip2_opt")
NAMES = [*(name.removeprefix("lstp_") for name in BENCHMARKS), "shapes_qa"]

GROUNDING = ("charades_sta", "activitynet_captions", "qvhighlights", "timelens")


def config(name: str, *options: str):
    return Config(SimpleNamespace(cfg_path=f"projects/lstp/eval/{name}.yaml", options=list(options))).config


# ---- composed -----------------------------------------------------------------------------------------------------


def test_every_pair_is_listed_and_no_part_of_one(capsys):
    assert {Path(path).stem for path in evaluations()} == {f"{name}_{model}" for name in NAMES for model in MODELS}
    assert cli.main(["list", "recipes"]) == 0
    listed = [path for path in capsys.readouterr().out.split() if "/eval/" in path]
    assert listed == sorted(evaluations())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_every_pair_is_complete(name, model):
    whole = config(f"{name}_{model}")
    assert list(whole.datasets) == ["lstp_shapes" if name == "shapes_qa" else f"lstp_{name}"]
    (section,) = whole.datasets.values()
    assert (
        whole.model.arch == model
        and whole.run.task == ("temporal_grounding" if name in GROUNDING else "video_qa")
        and whole.run.evaluate
    )
    assert whole.run.output_dir == str(Path(f"output/lstp/eval/{name}_{model}").absolute())
    assert section.image_size == (64 if model == "lstp_tiny" else 224)
    assert section.image_frames == (4 if model.startswith("blip2") else 1)
    if name != "shapes_qa":
        assert set(whole.run.test_splits) <= set(section.build_info.annotations)
    assert section.flow == ("motion_vectors" if model == "lstp_tiny" else "none")


def test_the_demos_evaluation_is_one_of_them():
    same = ["run.output_dir=here"]
    demo = Config(SimpleNamespace(cfg_path="projects/lstp/tiny_eval.yaml", options=same)).config
    assert config("shapes_qa_lstp_tiny", *same) == demo


def test_a_pair_that_is_none_is_answered_with_the_nearest_one(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'projects/lstp/eval/nextqa_lstp_vicuna7b.yaml'"):
        config("nextqa_lstp_vicuna7")
    assert evaluation_parts(tmp_path / "a_b.yaml") is None
    for part in ("benchmarks/a_b", "models/c_d"):
        (tmp_path / f"{part}.yaml").parent.mkdir()
        (tmp_path / f"{part}.yaml").write_text("{}")
    assert [path.stem for path in evaluation_parts(tmp_path / "a_b_c_d.yaml")] == ["a_b", "c_d"]
    assert evaluation_parts(tmp_path / "a_b_c_e.yaml") is None


def test_an_evaluation_is_found_by_its_absolute_path():
    whole = Config(SimpleNamespace(cfg_path=str(ROOT / "projects/lstp/eval/star_blip2_opt.yaml"), options=[])).config
    assert whole.model.arch == "blip2_opt"


# ---- run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The folder to stand in: tiny benchmarks below inputs/, tiny weights under the hub's and LAVIS's names."""
    root = tmp_path_factory.mktemp("evaluations")
    write_benchmarks(root, ["nextqa", "msvd_qa", "star", "mvbench"])
    backbones = ["instructblip-vicuna-7b", "instructblip-flan-t5-xl", "blip2-flan-t5-xl"]
    write_all(root / "weights", only=[*backbones, "bert-base-uncased", "raft-sintel", "lstp-7b"])
    with lavis_tiny.hub(root), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAVIS_LSTP_WEIGHTS", str(root / "weights"))
        yield root


def run(name: str, *options: str) -> tuple[dict, list[dict]]:
    """Metrics and records of an evaluation by its command line."""
    (section,) = config(name).datasets
    split = config(name).run.test_splits[0]
    small = [f"datasets.{section}.num_frames=4", "run.device=cpu", "run.num_workers=0", "run.batch_size_eval=4"]
    command = ["--cfg-path", f"projects/lstp/eval/{name}.yaml", "--options", *small, *options]
    assert evaluate.main(command) == 0
    result = Path("output/lstp/eval", name, "result")
    metrics = json.loads((result / f"{split}_video_qa_metrics.json").read_text())
    return metrics, list(read_jsonl(result / f"{split}_video_qa.jsonl"))


@pytest.mark.parametrize(
    "name", ["mvbench_lstp_vicuna7b", "star_lstp_flant5xl", "msvd_qa_lstp_instruct_flant5xl", "nextqa_lstp_flant5xl"]
)
def test_lstp_answers_a_benchmark(work, name):
    (section,) = config(name).datasets
    tiny = [*size_options(), f"datasets.{section}.image_size={Sizes().image_size}"]
    few = ["model.generation.max_new_tokens=3", "model.flow.iterations=1"]
    untrained = [] if name.endswith("vicuna7b") else ["model.checkpoint=null"]
    metrics, records = run(name, *tiny, *few, *untrained)
    assert metrics["coverage"] == 1.0 and len(records) == (20 if "mvbench" in name else 6)
    assert all(record["log_prob"]["tokens"] <= 3 and record["log_prob"]["sum"] < 0 for record in records)
    assert all(0 <= record["span"][0] < record["span"][1] <= 4 for record in records)
    if "options" in records[0]:
        assert metrics["num_unparsable"] == sum(record["choice"] is None for record in records)
    if name.startswith("star"):
        assert [record["frame_times"][0] >= 0.1 for record in records] == [True] * 6, "frames of the clip alone"


@pytest.mark.parametrize("name", ["msvd_qa_blip2_t5", "nextqa_blip2_t5", "msvd_qa_blip2_opt"])
def test_laviss_own_models_answer_the_same_questions(work, name):
    """The tiny OPT has 64 positions: a short prompt, and no options."""
    benchmark, _, language = name.rpartition("_blip2_")
    size = lavis_tiny.IMAGE_SIZE
    tiny = [f"model.{key}={value}" for key, value in lavis_tiny.config(f"blip2_{language}", work).items()]
    data = [f"image_size={size}", f"vis_processor.eval.image_size={size}", "image_frames=2"]
    short = ["run.prompt='Q: {}'"] if language == "opt" else []
    options = [*tiny, *(f"datasets.lstp_{benchmark}.{option}" for option in data), "run.max_len=3", *short]
    _, records = run(name, *options)
    assert len(records) == 6 and all(isinstance(record["prediction"], str) for record in records)
    start = "Q: what colour" if short else "Question: what colour"
    assert records[0]["prompt"].startswith(start) and ("\n(A) " in records[0]["prompt"]) == (benchmark == "nextqa")


@pytest.mark.slow
def test_the_documents_walk_through_an_empty_folder(tmp_path):
    """docs/benchmarks.md, line by line: evaluate, ablate, compare, judge, report."""
    (lines,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"), re.S)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = ["bash", "-euo", "pipefail", "-c", lines]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for said in ("| LSTP (predicted span), 4 frames |", "McNemar   only a right", "rules     ", "report.html: 1 evalu"):
        assert said in done.stdout
    result = tmp_path / "output/lstp/eval/msvd_qa_lstp_vicuna7b/result"
    assert len(list(read_jsonl(result / "test_video_qa_judged_rules.jsonl"))) == 6


# ---- several frames through LAVIS's generate ----------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "language"), [("blip2_t5", "t5"), ("blip2_opt", "opt")])
def test_laviss_language_model_reads_the_frames_one_after_the_other(work, arch, language):
    model = lavis_tiny.build(arch, work)
    frames = torch.rand(2, 3, 3, lavis_tiny.IMAGE_SIZE, lavis_tiny.IMAGE_SIZE)
    projected = []
    projection = getattr(model, f"{language}_proj")
    real = projection.forward
    projection.forward = lambda x: projected.append(real(x)) or projected[-1]
    seen = []
    projection.register_forward_hook(lambda _, args, out: seen.append(out))

    def ask(images):
        with several_frames(model, images), torch.no_grad():
            return model.generate({"image": images, "prompt": "what is it?"}, num_beams=1, max_length=4)

    whole = ask(frames)
    assert len(whole) == 2 and projected[0].shape[:2] == (6, lavis_tiny.QUERIES)
    one = ask(frames[:, :1])
    assert one == ask(frames[:, 0]), "one frame is a picture"
    alone = torch.stack([torch.cat([projected[0][3 * b + k] for k in range(3)]) for b in range(2)])
    told = []
    generate = getattr(model, f"{language}_model").generate
    getattr(model, f"{language}_model").generate = lambda **kwargs: told.append(kwargs) or generate(**kwargs)
    ask(frames)
    embeddings = told[0].get("query_embeds", told[0].get("inputs_embeds"))
    assert torch.allclose(embeddings[:, : 3 * lavis_tiny.QUERIES], alone, atol=1e-5)
    assert not model.visual_encoder._forward_pre_hooks, "the model is as before"


def test_other_models_say_what_they_cannot(work):
    with pytest.raises(ConfigError, match="image_frames shows several frames to LAVIS's blip2_t5 and blip2_opt"):
        with several_frames(torch.nn.Linear(1, 1), torch.zeros(1, 2, 3, 4, 4)):
            pass


def test_frames_for_laviss_models_are_spread_over_the_video(tmp_path):
    from lavis.processors.blip_processors import BlipImageEvalProcessor
    from video_files import write_video

    write_video(tmp_path / "v.mp4", [numbered_picture(i, 64, 64) for i in range(8)])
    row = {"question_id": "q", "video": "v.mp4", "video_id": "v", "question": "what?", "answer": "it"}
    processor = BlipImageEvalProcessor(image_size=32)
    sample = VideoQADataset([row], tmp_path, num_frames=8, image_frames=4, vis_processor=processor)[0]
    assert sample["image"].shape == (4, 3, 32, 32)
    grey = sample["image"][:, :, 14:18, 14:18].mean((1, 2, 3))
    assert torch.equal(grey, grey.sort().values) and grey[0] < grey[-1] - 0.1
    few = VideoQADataset([row], tmp_path, num_frames=2, image_frames=4, vis_processor=processor)[0]
    assert few["image"].shape == (4, 3, 32, 32) and torch.equal(few["image"][0], few["image"][1])
