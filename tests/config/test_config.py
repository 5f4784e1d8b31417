"""Configurations: what is merged over what, and one clear line for everything that cannot be used."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_lstp.config import Config, find_config, options_to_dotlist, recipes
from lavis_lstp.config.load import evaluations, project_files
from lavis_lstp.config.model import checked_model
from lavis_lstp.config.other_keys import check_transformers
from lavis_lstp.errors import ConfigError
from lavis_lstp.host import launch

BASE = """
model:
  arch: lstp_tiny
datasets:
  lstp_video_qa:
    build_info:
      annotations:
        test: {storage: questions.json}
      videos: {storage: videos}
run:
  task: video_qa
  runner: runner_lstp
  test_splits: [test]
  train_splits: [test]
  init_lr: 1.0e-3
  device: cpu
"""

LAVIS = """
model:
  arch: blip2_t5
  model_type: pretrain_flant5xl
  t5_model: google/flan-t5-small
datasets:
  coco_caption:
    vis_processor:
      train: {name: blip2_image_train, image_size: 64}
run:
  task: captioning
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a configuration in an otherwise empty current folder; returns what --cfg-path gets."""
    monkeypatch.chdir(tmp_path)
    Path("questions.json").write_text("[]", encoding="utf-8")
    Path("videos").mkdir()

    def write_config(text: str = BASE) -> str:
        Path("run.yaml").write_text(text, encoding="utf-8")
        return "run.yaml"

    return write_config


def load(path: str, *options: str) -> Config:
    return Config(types.SimpleNamespace(cfg_path=path, options=list(options)))


def error_line(capsys, path: str, *options: str, main=launch.main) -> str:
    """The one line that `python -m lavis.train` prints for a configuration that cannot be used."""
    status = main(["--cfg-path", path, *(["--options", *options] if options else [])])
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line]
    assert line.startswith(f"error: {path}: ") or line.startswith("error: unknown config file")
    return line


# --- what is merged ---------------------------------------------------------------------------------------------


def test_defaults_lie_under_the_file_and_options_on_top(write):
    cfg = load(write(), "run.seed=7", "model.selector.name=uniform", "datasets.lstp_video_qa.num_frames=8")
    assert cfg.run_cfg.seed == 7
    assert cfg.run_cfg.dist_url == "env://" and cfg.run_cfg.distributed is False
    assert cfg.model_cfg.model_type == "default"
    assert cfg.model_cfg.selector.name == "uniform"
    assert cfg.model_cfg.selector.num_selected == 4
    assert cfg.datasets_cfg.lstp_video_qa.num_frames == 8
    assert cfg.datasets_cfg.lstp_video_qa.build_info.annotations.test.storage == "questions.json"
    cfg.pretty_print()


def test_both_styles_of_options():
    assert options_to_dotlist(["a.b=1", "c.d", "2", "e=x=y"]) == ["a.b=1", "c.d=2", "e=x=y"]
    assert options_to_dotlist(None) == []
    with pytest.raises(ConfigError, match="option 'c.d' has no value"):
        options_to_dotlist(["a.b=1", "c.d"])


def test_an_option_for_model_type_selects_its_defaults(write):
    """LAVIS merges the options last and keeps the defaults of the type named in the file."""
    path = write(LAVIS)
    assert load(path).model_cfg.get("vit_model") is None
    cfg = load(path, "model.model_type=pretrain_flant5xl_vitL")
    assert cfg.model_cfg.vit_model == "clip_L"
    assert cfg.model_cfg.t5_model == "google/flan-t5-small"


def test_relative_output_dir_is_relative_to_where_the_user_stands(write, tmp_path):
    assert load(write(), "run.output_dir=results/a").run_cfg.output_dir == str(tmp_path / "results" / "a")
    assert load(write(), "run.output_dir=/abs/b").run_cfg.output_dir == "/abs/b"
    assert load(write()).run_cfg.output_dir == str(tmp_path / "output")


def test_null_in_the_run_section_means_not_given(write):
    assert load(write(), "run.seed=null").run_cfg.seed == 42


def test_laviss_runner_gets_the_values_it_has_no_default_for(write):
    run = load(write(LAVIS)).run_cfg
    assert run.runner == "runner_base"
    assert (run.batch_size_train, run.lr_sched, run.weight_decay) == (8, "linear_warmup_cosine_lr", 0.05)
    assert "batch_size_train" not in load(write()).run_cfg  # ours has its own defaults


@pytest.mark.parametrize(
    "model, task, runner",
    [
        ("lstp_tiny", "video_qa", "runner_lstp"),
        ("lstp_tiny", "captioning", "runner_lstp"),
        ("blip2_t5", "video_qa", "runner_lstp"),
        ("blip2_t5", "captioning", "runner_base"),
    ],
)
@pytest.mark.parametrize("given", ["", "  runner: null\n"])
def test_the_default_runner_is_ours_with_our_model_or_task(write, model, task, runner, given):
    text = f"model: {{arch: {model}}}\ndatasets: {{lstp_video_qa: {{}}}}\nrun:\n  task: {task}\n{given}"
    assert load(write(text)).run_cfg.runner == runner
    assert load(write(text), "run.runner=runner_iter").run_cfg.runner == "runner_iter"


def test_interpolations_are_resolved(write):
    cfg = load(write(), "run.seed=5", "model.selection_seed=${run.seed}")
    assert cfg.model_cfg.selection_seed == 5


def test_laviss_own_configurations_are_accepted(write):
    """All but two: one is an empty file, the other names a model_type that its class does not have."""
    import lavis

    root = Path(lavis.__file__).parent / "projects"
    refused = {}
    for path in sorted(root.rglob("*.yaml")):
        try:
            load(str(path))
        except ConfigError as error:
            refused[path.name] = str(error)
    if not list(root.rglob("*.yaml")):
        pytest.skip(f"this LAVIS has no configurations in {root}")
    assert set(refused) <= {"caption_coco_flant5xl_eval.yaml", "coco_cap_ft_iter.yaml"}, refused


def test_keys_that_only_laviss_sources_know_are_accepted(write):
    """`max_txt_len` and `apply_lemmatizer` are read by Blip2T5.from_config and stand in no YAML."""
    cfg = load(write(LAVIS), "model.max_txt_len=16", "model.apply_lemmatizer=true")
    assert cfg.model_cfg.max_txt_len == 16


@pytest.mark.parametrize("every_pair", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recipes_are_found_from_any_folder_and_hold_valid_keys_only(tmp_path, monkeypatch, every_pair):
    """Quick: every file; of the pairs of a benchmark and a model, each benchmark and each model."""
    monkeypatch.chdir(tmp_path)
    pairs, models = evaluations(), len(project_files("lstp/eval/models/*.yaml"))
    assert "projects/lstp/tiny_ft.yaml" in recipes() and len(pairs) // models >= models
    some = [pair for n, pair in enumerate(pairs) if n // models % models == n % models]
    for recipe in pairs if every_pair else [*some, *(set(recipes()) - set(pairs))]:
        assert load(recipe).run_cfg.runner == "runner_lstp"


# --- one line for everything that cannot be used --------------------------------------------------------------------


def test_missing_config_names_itself(write, capsys):
    assert "unknown config file 'nowhere.yaml'" in error_line(capsys, "nowhere.yaml")


def test_misspelt_recipe_names_the_nearest(capsys):
    misspelt = recipes()[0].replace(".yaml", "x.yaml")
    assert f"did you mean '{recipes()[0]}'" in error_line(capsys, misspelt)


def test_evaluate_reports_in_the_same_way(write, capsys):
    from lavis_lstp.host import evaluate

    assert "did you mean 'video_qa'" in error_line(capsys, write(), "run.task=video_qs", main=evaluate.main)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "section 'model' is missing"),
        ("- a\n- b\n", "got a list"),
        ("just text", "section"),
        ("run: {task: [\n", "line 2"),
        ("run: {a: 1, a: 2}", "duplicate key a"),
        ("model: {arch: lstp_tiny}\nrun: {task: video_qa}", "section 'datasets' is missing"),
        ("model: {arch: lstp_tiny}\ndatasets: {}\nrun: {task: video_qa}", "names no data set"),
        ("model: {arch: lstp_tiny}\ndatasets: 3\nrun: {task: video_qa}", "section 'datasets' must be a mapping, got 3"),
        ("model: {arch: lstp_tiny}\ndatasets: {lstp_video_qa: 3}\nrun: {task: video_qa}", "must be a mapping, got 3"),
        ("model: {}\ndatasets: {lstp_video_qa: {}}\nrun: {task: video_qa}", "model.arch is missing; known:"),
        ("model: {arch: lstp_tiny}\ndatasets: {lstp_video_qa: {}}\nrun: {}", "run.task is missing; known:"),
        (BASE + "runn: {}\n", "unknown section 'runn'; did you mean 'run'?"),
        ("\x00", "not YAML"),
    ],
)
def test_files_that_are_no_configuration(write, capsys, text, said):
    assert said in error_line(capsys, write(text))


def test_files_that_cannot_be_read(write, capsys, tmp_path):
    write()
    (tmp_path / "latin.yaml").write_bytes(b"run: {task: \xe9t\xe9}")
    assert "cannot read" in error_line(capsys, "latin.yaml")
    assert "is a folder" in str(pytest.raises(ConfigError, find_config, tmp_path).value)


@pytest.mark.parametrize(
    "option, said",
    [
        ("model.arch=lstp_tinny", "unknown model 'lstp_tinny'; did you mean 'lstp_tiny'?"),
        ("model.model_type=defualt", "unknown model_type of lstp_tiny 'defualt'; did you mean 'default'?"),
        ("run.task=video_instruckt", "unknown task 'video_instruckt'; did you mean 'video_instruct'?"),
        ("run.runner=runner_lst", "unknown runner 'runner_lst'; did you mean 'runner_lstp'?"),
        ("run.lr_sched=linear_warmup_cosine", "unknown lr_sched 'linear_warmup_cosine'; did you mean 'linear_warmup_"),
        ("datasets.lstp_video_q.num_frames=3", "unknown dataset 'lstp_video_q'; did you mean 'lstp_video_qa'?"),
        ("datasets.lstp_video_qa.type=big", "unknown type of dataset lstp_video_qa 'big'"),
        ("run.max_epok=3", "unknown key 'run.max_epok'; did you mean 'run.max_epoch'?"),
        ("run.xyzzy=3", "unknown key 'run.xyzzy'; known: accum_grad_iters"),
        ("model.selektor.name=lstp", "unknown key 'model.selektor'; did you mean 'model.selector'?"),
        ("model.selector.nam=lstp", "unknown key 'model.selector.nam'; did you mean 'model.selector.name'?"),
        ("datasets.lstp_video_qa.num_frame=3", "did you mean 'datasets.lstp_video_qa.num_frames'?"),
        (
            "datasets.lstp_video_qa.build_info.video.storage=x",
            "did you mean 'datasets.lstp_video_qa.build_info.videos'?",
        ),
        ("datasets.lstp_video_qa.build_info.annotations.test.storag=x", "annotations.test.storage'?"),
        (
            "datasets.lstp_video_qa.build_info.annotations.train=x.json",
            "annotations.train must be a mapping, got 'x.json'",
        ),
        ("datasets.lstp_video_qa.vis_processor.train.name=blip_image_trian", "did you mean 'blip_image_train'?"),
        ("datasets.lstp_video_qa.vis_processor.trian.name=blip_image_train", "vis_processor.train'?"),
        ("datasets.lstp_video_qa.vis_processor.train=blip_image_train", "must be a mapping with the key 'name'"),
        ("run.max_epoch=many", "run.max_epoch must be a whole number of at least 1, got 'many'"),
        ("run.max_epoch=1.5", "run.max_epoch must be a whole number of at least 1, got 1.5"),
        ("run.init_lr=fast", "run.init_lr must be a number of at least 0 and at most 1000000, got 'fast'"),
        ("run.test_splits=test", "run.test_splits must be a list, got 'test'; write [test]"),
        ("run.test_splits=[test", "cannot apply --options run.test_splits=[test: not YAML ('[' is not closed by ']')"),
        ("run.test_splits=[a #b]", "'#' begins a comment in YAML; put a text with it in quotes"),
        ("run.test_splits=[a] #b", "run.test_splits=[a] #b: '#' begins a comment in YAML"),
        ("run.seed=#", "cannot apply --options run.seed=#: '#' begins a comment in YAML"),
        ("run.seed=43 # as before", "run.seed=43 # as before: '#' begins a comment"),
        ("run.test_splits.0=test", "run.test_splits is a list, which is set whole: --options 'run.test_splits=[...]'"),
        ("run.seed: 1", "option 'run.seed: 1' has no value; write --options run.seed=1"),
        ("run.temperature=0.7", "run.temperature=0.7 shapes what tokens are drawn from"),
        ("run.top_k=5", "set model.generation.do_sample=true"),
        ("model.generation.top_p=0.9", "model.generation.top_p=0.9 shapes what tokens are drawn from"),
        ("run.min_len=10000", "run.min_len must be at most max_new_tokens ("),
        ("model.generation.min_new_tokens=10000", "model.generation.min_new_tokens must be at most max_new_tokens ("),
        ("run.num_captions=2", "run.num_captions=2: a question has one answer; set it to 1"),
        (
            "model.generation.num_return_sequences=2",
            "model.generation.num_return_sequences=2: a question has one answer; set it to 1",
        ),
        ("run.evaluate=perhaps", "run.evaluate must be true or false, got 'perhaps'"),
        (
            "datasets.lstp_video_qa.num_frames=lots",
            "num_frames must be a whole number of at least 1 and at most 1000000, got 'lots'",
        ),
        ("model.selector=lstp", "model.selector must be a mapping, got 'lstp'"),
        ("model.selection_seed=${run.seeed}", "seeed"),
        ("run.seed", "option 'run.seed' has no value"),
        ("run.seed=[1", "cannot apply --options run.seed=[1"),
        ("runn.seed=1", "unknown section 'runn'; did you mean 'run'?"),
        ("model=3", "section 'model' must be a mapping, got 3"),
        ("run.output_dir=${y}", "run.output_dir: Interpolation key 'y' not found; write \\${ where it is no"),
    ],
)
def test_names_and_keys_nobody_knows(write, capsys, option, said):
    assert said in error_line(capsys, write(), option)


@pytest.mark.parametrize(
    "words", ["run.init_lr = 1e-4", "run.init_lr= 1e-4", "run.init_lr= 1e-4 run.seed=1", "run.init_lr =1e-4"]
)
def test_blanks_around_the_sign(write, capsys, words):
    line = error_line(capsys, write(), *words.split())
    assert "option 'run.init_lr' has blanks around '='; write --options run.init_lr=1e-4" in line


BACKBONE = "model.backbone.config"


@pytest.mark.parametrize(
    "options, said",
    [
        (["vision_config.hiden_size=32"], f"did you mean '{BACKBONE}.vision_config.hidden_size'?"),
        (["qformer_config.num_hidden_layer=1"], f"did you mean '{BACKBONE}.qformer_config.num_hidden_layers'?"),
        (["text_config.num_heads=2"], f"'{BACKBONE}.text_config.num_heads'; did you mean"),  # T5's, and this is LLaMA
        (["text_config.model_type=t5", "text_config.d_modell=8"], f"did you mean '{BACKBONE}.text_config.d_model'?"),
        (["text_config.model_type=lama"], "unknown model_type in model.backbone.config.text_config: 'lama'"),
        (["num_query_token=8"], f"did you mean '{BACKBONE}.num_query_tokens'?"),
        (["vision_confg.hidden_size=32"], f"did you mean '{BACKBONE}.vision_config'?"),
        (["vision_config=32"], "vision_config must be a mapping, got 32"),
        (["vision_config=null"], "vision_config must be a mapping, got null"),
        (["text_config=t5"], "text_config must be a mapping, got 't5'"),
    ],
)
@pytest.mark.parametrize("family", ["instructblip", "blip2"])
def test_misspelt_keys_of_transformers_configurations(write, capsys, family, options, said):
    options = [f"model.backbone.family={family}", *(f"{BACKBONE}.{option}" for option in options)]
    assert said in error_line(capsys, write(), *options)


def test_misspelt_generation_settings(write, capsys):
    line = error_line(capsys, write(), "model.generation.max_new_token=3")
    assert "unknown key 'model.generation.max_new_token'; did you mean 'model.generation.max_new_tokens'?" in line
    assert "model.generation must be a mapping, got 3" in error_line(capsys, write(), "model.generation=3")


def test_sampling_of_the_run_section_goes_with_do_sample_and_neutral_values_without(write):
    load(write(), "run.temperature=0.7", "run.top_p=0.9", "model.generation.do_sample=true")
    load(write(), "run.temperature=1.0", "run.top_p=1.0", "run.num_captions=1")


def test_keys_that_transformers_knows_are_accepted(write):
    # intermediate_size is LLaMA's and in the defaults, so it lies in the manifest of every run
    t5 = (
        "model_type=t5",
        "intermediate_size=64",
        "d_model=64",
        "num_heads=2",
        "hidden_size=64",
        "decoder_start_token_id=0",
    )
    load(write(), *(f"{BACKBONE}.text_config.{option}" for option in t5), "model.generation.max_time=null")
    load(write(), f"{BACKBONE}.text_config.rope_theta=500.0", "model.generation=null")
    cfg = load(write(), f"{BACKBONE}=null", "model.backbone.weights=some/folder")
    assert cfg.model_cfg.backbone.config is None
    model_cls = registry.get_model_class("lstp_tiny")
    defaults = OmegaConf.to_container(model_cls.default_config().model)
    check_transformers(checked_model(defaults), defaults)


def test_sections_that_cannot_be_null(write, capsys):
    assert "model.selector must be a mapping, got null" in error_line(capsys, write(), "model.selector=null")


@pytest.mark.parametrize(
    "option, said",
    [
        ("model.t5_modell=x", "unknown key 'model.t5_modell'; did you mean 'model.t5_model'?"),
        ("datasets.coco_caption.vis_procesor.train.name=x", "did you mean 'datasets.coco_caption.vis_processor'?"),
        ("datasets.coco_caption.build_info.annotation.train.storage=x", "build_info.annotations'?"),
        ("datasets.coco_caption.build_info.annotations.train.storag=x", "annotations.train.storage'?"),
        ("run.batch_sise_train=3", "did you mean 'run.batch_size_train'?"),
    ],
)
def test_misspelt_keys_of_laviss_own_parts(write, capsys, option, said):
    assert said in error_line(capsys, write(LAVIS), option)


def test_cuda_without_a_device(write, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert launch.main(["--cfg-path", write(), "--options", "run.device=cuda"]) == 2
    assert "torch finds no CUDA device; use --options run.device=cpu" in capsys.readouterr().err
    assert launch.main(["--cfg-path", write(), "--options", "run.device=tpu"]) == 2
    assert "run.device must be auto, cpu or cuda, got 'tpu'" in capsys.readouterr().err


def test_job_ids_tell_runs_apart():
    """LAVIS's changes every ten minutes, so that runs overwrite each other."""
    assert len(launch.shared_job_id()) == len("20261122134500")


def test_a_list_of_checkpoints_replaces_the_one_a_type_comes_with(write):
    chosen = ["model.arch=lstp_vicuna7b", "model.model_type=pretrained"]
    assert load(write(), *chosen).model_cfg.checkpoint == "ColorfulAI/LSTP-Chat/LSTP-7B.ckpt"
    assert list(load(write(), *chosen, "model.checkpoint=[sampler,run]").model_cfg.checkpoint) == ["sampler", "run"]
