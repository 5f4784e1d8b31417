"""Settings: what a text means for a key, ranges, and no value of any key that ends in a traceback."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import types

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from safetensors.numpy import save_file

from lavis_lstp.config.data import SETTINGS, settings_of
from lavis_lstp.config.fields import ANY, LIST, TEXT, TEXTS, rules
from lavis_lstp.config.load import parse, with_options
from lavis_lstp.config.model import ModelSettings
from lavis_lstp.config.run import RunSettings
from lavis_lstp.errors import ConfigError, LstpError
from lavis_lstp.host import launch

RUN = """
model: {arch: lstp_tiny, flow: {name: none}, selector: {name: uniform}}
datasets: {lstp_video_qa: {num_frames: 4, image_size: 64,
  build_info: {annotations: {train: {storage: a.json}, test: {storage: a.json}}, videos: {storage: .}}}}
run: {task: video_instruct, runner: runner_lstp, output_dir: out, device: cpu, batch_size_train: 2, init_lr: 1.0e-3}
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder that is the current one: run.yaml, and two questions about a picture."""
    folder = tmp_path_factory.mktemp("settings")
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    rows = [{"question_id": str(i), "image": "a.png", "question": "what?", "answer": "red"} for i in range(2)]
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "run.yaml").write_text(RUN)
    save_file({"sampler.head.weight": np.zeros((2, 32), np.float32)}, folder / "narrow.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def config(*options: str, evaluate_only: bool = False):
    args = types.SimpleNamespace(cfg_path="run.yaml", options=list(options), local_rank=None)
    return launch.configured(args, evaluate_only)


def error(*options: str, evaluate_only: bool = False) -> str:
    """The line that a configuration is refused with."""
    with pytest.raises(LstpError) as caught:
        launch.built(config(*options, evaluate_only=evaluate_only), evaluate_only)
    (line,) = str(caught.value).splitlines()
    return line


# ---- texts stay texts


WORDS = ("20241127", "12:30", "010", "1e3", "yes", "on", "No", "0x1F", "2024-11-27", "Null", "None", "1_000", "[INST]")


@pytest.mark.parametrize("word", [*WORDS, ".5", "TRUE", "{a}", "a: b", "# a", "*", "- a", "'a' b"])
def test_a_text_is_taken_letter_by_letter(here, word):
    cfg = config(f"run.prompt={word}", f"run.output_dir={word}", f"model.answer_template={word} {{answer}}")
    assert (cfg.run_cfg.prompt, cfg.run_cfg.output_dir) == (word, str(here / word))
    assert cfg.model_cfg.answer_template == f"{word} {{answer}}"


@pytest.mark.parametrize("word", [word for word in WORDS if word != "[INST]"])
def test_a_text_in_a_file_is_taken_letter_by_letter(here, word):
    model, data = f"{{checkpoint: {word}, train: [{word}]}}", f"{{lstp_shapes: {{root: {word}}}}}"
    content = parse(f"{{run: {{output_dir: {word}}}, model: {model}, datasets: {data}}}")
    assert content["run"]["output_dir"] == content["model"]["checkpoint"] == content["model"]["train"][0] == word
    assert content["datasets"]["lstp_shapes"]["root"] == word


def test_texts_in_lists_and_by_split():
    said = with_options(
        OmegaConf.create({}),
        [
            "run.train_splits=[2024,on]",
            "model.checkpoint=[1e3, a]",
            "datasets.lstp_shapes.spans={train: 12:30, val: null}",
        ],
    )
    assert list(said.run.train_splits) == ["2024", "on"] and list(said.model.checkpoint) == ["1e3", "a"]
    assert said.datasets.lstp_shapes.spans == {"train": "12:30", "val": None}
    storage = "datasets.lstp_video_qa.build_info.annotations.2024.storage"
    assert OmegaConf.select(with_options(OmegaConf.create({}), [f"{storage}=010"]), storage) == "010"


def test_null_is_no_value_and_quotes_make_a_text_of_it(here):
    for word in ("null", "~", ""):
        assert config(f"run.output_dir={word}").run_cfg.output_dir == str(here / "output")
        assert config(f"model.checkpoint={word}").model_cfg.checkpoint is None
    assert config("run.output_dir='null'").run_cfg.output_dir == str(here / "null")
    assert config('run.prompt="a\\nb"').run_cfg.prompt == "a\nb"


def test_numbers_are_those_of_python():
    said = parse("{a: 010, b: 12:30, c: 1e-4, d: 1_000, e: 0x1F, f: 2024-11-27, g: .5, h: yes, i: -3, j: 1.5e3}")
    assert said == {
        **{"a": 10, "b": "12:30", "c": 1e-4, "d": 1000, "e": 31, "f": "2024-11-27", "g": 0.5, "h": True, "i": -3},
        "j": 1500.0,
    }


# ---- ranges


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("run.init_lr=nan", "run.init_lr must be a number of at least 0 and at most 1000000, got 'nan'"),
        ("run.seed=1e19", f"run.seed must be a whole number of at least 0 and at most {2**62}, got 1e+19"),
        ("model.generation.length_penalty=-1e40", "a number or null, no larger than 2**63 - 1, got -1e+40"),
        ("run.init_lr=.inf", "run.init_lr must be a number of at least 0 and at most 1000000, got inf"),
        ("run.init_lr=0", "run.init_lr must be above 0 to train, got 0"),
        ("run.warmup_ratio=2", "run.warmup_ratio must be a number of at least 0 and at most 1, got 2"),
        ("run.weight_decay=-1", "run.weight_decay must be a number of at least 0 and at most 1000000, got -1"),
        ("run.beta2=1", "run.beta2 must be a number of at least 0 and below 1, got 1"),
        ("run.seed=-1", "run.seed must be a whole number of at least 0 and at most 4611686018427387904, got -1"),
        ("run.max_grad_norm=0", "run.max_grad_norm must be a number above 0 or null, got 0"),
        (
            "run.num_workers=1e9",
            "run.num_workers must be a whole number of at least 0 and at most 4096, got 1000000000.0",
        ),
        (
            "run.train_dataset_ratios={lstp_video_qa: -1}",
            "run.train_dataset_ratios.lstp_video_qa must be a number of at least 0",
        ),
        (
            "model.generation.num_beams=0",
            "model.generation.num_beams must be a whole number of at least 1 or null, got 0",
        ),
        (
            "model.generation.top_p=1.5",
            "model.generation.top_p must be a number above 0 and at most 1 or null, got 1.5",
        ),
        ("model.generation.max_new_tokens=0", "model.generation.max_new_tokens must be a whole number of at least 1"),
        ("model.generation.bad_words_ids=[3,4]", "model.generation.bad_words_ids[0] must be a list [a whole number of"),
        (
            "model.generation.sequence_bias={3: 2.0}",
            "model.generation.sequence_bias must be a list [a list [a list [a whole number of at least 0, ...], a numb",
        ),
        ("model.generation.renormalize_logits=maybe", "model.generation.renormalize_logits must be true or false, got"),
        ("model.sampler.dropout=1", "model.sampler.dropout must be a number of at least 0 and below 1, got 1"),
        (
            "model.flow.flow_size=0",
            "model.flow.flow_size must be a whole number of at least 1 and at most 100000 or null, got 0",
        ),
        ("model.lora={r: 0}", "model.lora.r must be a whole number of at least 1 and at most 1000000, got 0"),
        (
            "model.backbone.config.vision_config.hidden_size=-1",
            "hidden_size must be a whole number of at least 1 and at most 1000000, got -1",
        ),
        ("datasets.lstp_video_qa.fps=0", "datasets.lstp_video_qa.fps must be a number above 0 or null, got 0"),
        (
            "datasets.lstp_video_qa.max_bad_fraction=1.1",
            "max_bad_fraction must be a number of at least 0 and at most 1, got 1.1",
        ),
        (
            "datasets.lstp_video_qa.shards.attempts=0",
            "shards.attempts must be a whole number of at least 1 and at most 1000, got 0",
        ),
        (
            "datasets.lstp_video_qa.num_frames=null",
            "num_frames must be a whole number of at least 1 and at most 1000000, got null",
        ),
        ("run.warmup_ratio=${run.seed}", "run.warmup_ratio must be a number of at least 0 and at most 1, got 42"),
        ("run.log_freq=" + "9" * 5000, "run.log_freq must be a whole number of at least 1, got '999"),
    ],
)
def test_numbers_have_a_range(here, option, said):
    line = error(option)
    assert said in line and len(line) < 400


def test_a_temperature_of_nothing(here):
    sampling = ("model.generation.temperature=0", "model.generation.do_sample=true")
    assert "temperature must be at least 1e-20 where do_sample is true, got 0" in error(*sampling)
    config(sampling[0])


def numbers(settings: type, where: str = ""):
    for name, rule in rules(settings).items():
        inside = rule.section or rule.limits.get("keys")
        if inside:
            yield from numbers(inside, f"{where}{name}.")
        elif rule.kind in ("a number", "a whole number"):
            yield f"{where}{name}", rule


UNLIMITED = {"length_penalty", "generation.length_penalty"}
"""Any finite number has a meaning."""


@pytest.mark.parametrize("settings", [ModelSettings, RunSettings, *SETTINGS.values(), settings_of("lstp_nextqa")])
def test_every_number_has_a_range(settings):
    without = {name for name, rule in numbers(settings) if not set(rule.limits) & {"least", "above"}}
    assert without <= UNLIMITED
    for name, rule in numbers(settings):
        for bad in (
            float("nan"),
            float("inf"),
            -float("inf"),
            "nan",
            "many",
            True,
            [],
            {},
            2**64,
            rule.limits.get("least", 0) - 9,
        ):
            if name not in UNLIMITED or bad != -9:
                with pytest.raises(ConfigError, match="must be"):
                    rule.checked(bad, name)


def fields_of(settings: type, where: str):
    """Each key, the keys inside of sections too, with its rule."""
    for name, rule in rules(settings).items():
        yield f"{where}.{name}", rule
        inside = rule.section or rule.limits.get("keys") or (rule.item and rule.item.section)
        if inside:
            between = "" if rule.section or rule.limits.get("keys") else ".train"
            yield from fields_of(inside, f"{where}.{name}{between}")


SECTIONS = {"run": RunSettings, "model": ModelSettings} | {
    f"datasets.{name}": found for name, found in SETTINGS.items()
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_refusal_names_the_key_the_value_and_what_is_allowed(section):
    counted = 0
    for where, rule in fields_of(SECTIONS[section], section):
        names = rule.limits.get("one_of")
        if rule.kind == ANY or rule.section:
            continue
        bad = f"{sorted(names)[0]}q" if names else ["q"] if rule.kind == TEXT else "maybe"
        with pytest.raises(ConfigError) as caught:
            rule.checked(
                [bad] if rule.kind in (LIST, TEXTS) and names else {"q": {"q": 1}} if rule.kind == TEXTS else bad, where
            )
        (line,) = str(caught.value).splitlines()
        assert where in line and str(bad if names or rule.kind != TEXTS else "q") in line, line
        assert (
            all(name in line for name in names) and "did you mean" in line if names else f"must be {rule.kind}" in line
        ), line
        counted += 1
    assert counted > 5


# ---- splits


@pytest.mark.parametrize("key", ["train_splits", "valid_splits", "test_splits"])
def test_every_split_that_is_named_exists(here, key):
    line = error(f"run.{key}=[train,trian]")
    assert f"unknown split in run.{key}: 'trian'; did you mean 'train'?" in line
    assert "(lstp_video_qa has train, test); name one of these, or give it a file in datasets.<name>.build_info" in line


def test_an_evaluation_asks_for_the_splits_that_it_reads(here):
    config("run.train_splits=[trian]", "run.valid_splits=[vall]", "run.test_splits=[test]", evaluate_only=True)
    assert "run.test_splits: 'tset'; did you mean 'test'?" in error("run.test_splits=[tset]", evaluate_only=True)


def test_a_split_of_one_data_set_alone_is_said(caplog):
    from torch.utils.data import TensorDataset

    from lavis_lstp.runners.splits import training_parts

    data = {"a": {"train": TensorDataset()}, "b": {"train": TensorDataset(), "more": TensorDataset()}}
    for split in data["a"] | data["b"]:
        for own in data.values():
            if split in own:
                own[split].__class__.__len__ = lambda self: 1
    assert set(training_parts(data, ["train", "more"], None)) == {"a.train", "b.train", "b.more"}
    assert "run.train_splits: data set a has no split 'more'" in caplog.text
    with pytest.raises(
        ConfigError, match=r"run.train_splits: 'mroe'; did you mean 'more'\?.*a has train; b has train, more"
    ):
        training_parts(data, ["train", "mroe"], None)


# ---- before LAVIS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["run.max_epok=1"], "did you mean 'run.max_epoch'?"),
        (["model.checkpoint=2024"], "no weights at '2024'"),
        (["model.checkpoint=None"], "owner/repository/file; no value is null there"),
        (["model.backbone.weights=weights/of/nobody"], "missing weights"),
        (
            ["model.checkpoint=narrow.safetensors", "model.selector.name=lstp"],
            "'sampler.head.weight' is [2, 32] in the file, [2, 64] in the model",
        ),
        (["model.losses=[span]"], "do not go together"),
        (["datasets.lstp_video_qa.build_info.videos.storage=gone"], "no such folder: gone"),
        (["run.runner=runner_deepspeed"], "needs run.deepspeed"),
        (["model.selector.name=bitcost"], "selector 'bitcost' needs datasets.lstp_video_qa.bit_cost: true"),
    ],
)
def test_what_is_known_without_lavis_is_said_without_it(here, options, said):
    """A fresh interpreter in which torch and LAVIS cannot be imported."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from lavis_lstp.host import launch; launch.check_first(sys.argv[1:], 'lavis.train')"
    )
    words = ["--cfg-path", "run.yaml", "--options", *options]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_the_hook_checks_a_run_before_lavis_is_imported(here):
    words = ["-X", "importtime", "-m", "lavis.train", "--cfg-path", "run.yaml", "--options", "run.max_epok=1"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 2 and "did you mean 'run.max_epoch'?" in done.stderr
    assert not {"torch", "transformers", "lavis.common"} & imported and "lavis_lstp.host.precheck" in imported
    assert "importing PyTorch" not in done.stderr


@pytest.mark.parametrize(("rank", "told"), [(None, True), ("0", True), ("1", False)])
def test_the_first_process_says_what_is_waited_for(here, monkeypatch, capsys, rank, told):
    from lavis_lstp.host import launch

    monkeypatch.setattr(launch, "_waiting_since", [])
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    launch.check_first(["--cfg-path", "run.yaml"], "lavis.train")
    said = capsys.readouterr().err
    assert (
        said.splitlines()
        == ["lavis.train: the configuration can be used; importing PyTorch, transformers and LAVIS ..."] * told
    )
    assert len(launch._waiting_since) == told


def test_deepspeed_that_is_missing_is_said_at_once(here, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else find(name, *rest)
    )
    options = ("run.runner=runner_deepspeed", "run.deepspeed=projects/lstp/deepspeed/zero2.json")
    assert "needs DeepSpeed, which is not installed; pip install" in error(*options)


@pytest.mark.parametrize(
    "key",
    [
        *(
            "model.checkpoint",
            "model.flow.weights",
            "model.backbone.weights",
            "model.sampler.tokenizer",
            "run.output_dir",
        ),
        *("datasets.lstp_video_qa.spans", "datasets.lstp_video_qa.build_info.videos.storage", "run.resume_ckpt_path"),
        "datasets.lstp_video_qa.build_info.annotations.train.storage",
    ],
)
def test_names_too_long_for_a_file(here, key, capsys):
    flow = "raft_small" if "flow" in key else "none"
    words = ["--cfg-path", "run.yaml", "--options", f"{key}={'x' * 5000}", f"model.flow.name={flow}"]
    words.append("model.selector.name=lstp")  # which looks at all of these
    assert launch.main(words) == 2
    assert [line[:7] for line in capsys.readouterr().err.splitlines() if "error" in line] == ["error: "]


@pytest.mark.parametrize("key", ["model.arch", "model.model_type", "run.task", "run.runner"])
def test_names_in_a_file_that_are_no_texts(here, key):
    section, name = key.split(".")
    content = OmegaConf.merge(OmegaConf.create(parse(RUN)), {section: {name: {"a": 1}}})
    (here / "odd.yaml").write_text(OmegaConf.to_yaml(content))
    with pytest.raises(ConfigError, match=f"odd.yaml: {key} must be text, got"):
        launch.configured(types.SimpleNamespace(cfg_path="odd.yaml", options=[]))


# ---- any value of any key


KEYS = [
    *dict(fields_of(RunSettings, "run")),
    *dict(fields_of(ModelSettings, "model")),
    *dict(fields_of(settings_of("lstp_video_qa"), "datasets.lstp_video_qa")),
    *(
        "run",
        "model",
        "datasets",
        "datasets.lstp_video_qa",
        "datasets.x",
        "x",
        "run.x.y",
        "run.seed.x",
        "model..x",
        ".",
    ),
    *("", "run.train_splits[0]", "run.train_splits.0", "model.generation.bad_words_ids"),
    *("model.backbone.config.text_config.model_type", "model.backbone.config.vision_config.hidden_act"),
]
VALUES = [
    *("", " ", "null", "~", "none", "yes", "off", "true", "-1", "0", "1", "2", "7", "1.5", "1e3", "-1e-9", "1e400"),
    *("nan", ".inf", "-.inf", "010", "0x1F", "12:30", "2024-01-01", "9" * 18, "9" * 25, "9" * 5000, "[]", "[1]"),
    *("[a, b]", "[[]]", "[null]", "{}", "{a: 1}", "{a: {b: [1]}}", "{1: 2}", "{[a]: b}", "{a: 1, a: 2}", "'", '"'),
    *("'a'", "[", "{", "}", "a: b: c", "&a [*a]", "*x", "!!python/object/apply:os.system [ls]", "!!binary aGk="),
    *("!!binary '%'", "!!set {a}", "!!int x", "!!x y", "${run.seed}", "${nope}", "${", "${oc.env:NOPE}", "${model}"),
    *("???", "\u2028", "é", "\ud800", "\t", "- a", "a\nb", "!", "%", "@", "`", "|", ">", "=", "a=b", "<<", "{<<: 1}"),
    *("? a", "#", "x" * 3000, "[" * 2000, '"\\0"', "{train: 1}", "../..", "/dev/null", "a.json", ".", "a.png", "auto"),
    *("all", "http://localhost:1/x.tar", "file:///a", "{question}", "{answer}"),
]


def outcome(option: str, models: dict) -> str | None:
    """None where a run would begin or be refused in one line; else what a traceback would end with."""
    try:
        cfg = config(option)
        section = json.dumps(cfg.to_dict()["model"], sort_keys=True, default=str)
        if section not in models or not option.startswith("model"):
            model = models.get(section)
            with pytest.MonkeyPatch.context() as patch:
                if model is not None:  # built before
                    from lavis_lstp.tasks.base import LSTPTask

                    patch.setattr(LSTPTask, "build_model", lambda self, cfg: model)
                models[section] = launch.built(cfg)[-1]
    except LstpError as refused:
        return None if str(refused) and len(str(refused)) < 5000 else f"an empty or endless line: {str(refused)[:200]}"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # what this test looks for
        return f"{type(error).__name__}: {error}"[:300]
    return None


def fuzz(count: int, seed: int) -> list[str]:
    pairs = list(itertools.product(KEYS, VALUES))
    chosen = random.Random(seed).sample(pairs, min(count, len(pairs)))
    models: dict = {}
    found = [(f"{key}={value}", outcome(f"{key}={value}", models)) for key, value in chosen]
    return [f"{option[:100]!r}: {what}" for option, what in found if what]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("model.generation=${run.seed}", "model.generation must be a mapping, got 42"),
        ("model.generation=${oc.env:LSTP_NOBODY_SETS_THIS}", "LSTP_NOBODY_SETS_THIS"),
        ("model.sampler_prompt=${run.seed}", "model.sampler_prompt must contain {question}, got '42'"),
        ("model.prompt=${run.seed}", "model.prompt must contain {question}, got '42'"),
        ("model.checkpoint=${run.seed}", "no weights at '42'"),
        ("model.backbone.weights=${run.seed}", "cache, and the hub does not answer: 42 (model.backbone.weights)"),
        ("datasets.lstp_video_qa.spans=${run.seed}", "42: no such span file"),
        ("datasets.lstp_video_qa.build_info.videos.storage=${run.seed}", "no such folder: 42"),
        ("datasets.lstp_video_qa.build_info.annotations.train.storage=${run.seed}", "42: no such annotation file"),
        ("model.backbone.weights=a.json", "a.json' is a file; expected a folder in the hub's layout"),
        ("model.sampler.tokenizer=a.json", "a.json' is a file; expected a folder in the hub's layout"),
    ],
)
def test_what_five_thousand_values_found(here, option, said):
    assert said in error(option, "model.selector.name=lstp")  # which looks through the sampler


def test_an_interpolation_that_stands_for_a_number_is_a_text_where_texts_are(here):
    cfg = config("run.output_dir=${run.seed}", "run.seed=7", "datasets.lstp_video_qa.flow_root=${run.seed}")
    assert cfg.run_cfg.output_dir == str(here / "7") and cfg.datasets_cfg.lstp_video_qa.flow_root == "7"
    assert config("run.output_dir=out/${model.arch}").run_cfg.output_dir == str(here / "out/lstp_tiny")


def test_no_value_of_a_key_ends_in_a_traceback(here):
    assert fuzz(120, seed=1) == []


@pytest.mark.slow
def test_none_of_five_thousand_values_ends_in_a_traceback(here):
    assert fuzz(5000, seed=2) == []
