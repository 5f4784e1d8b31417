"""LSTP over LAVIS's own models, at tiny size: LAVIS's losses and answers, our training and checkpoints."""

from __future__ import annotations

import os

import lavis_tiny
import pytest
import torch
from lavis.common.registry import registry
from lavis_tiny import IMAGE_SIZE, QUERIES
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.models.answer.lavis_models import ARCHS, begin_as_told
from lavis_lstp.models.lstp import LSTP
from lavis_lstp.models.pixels import IMAGE_MEAN, IMAGE_STD
from lavis_lstp.models.variants import CONFIGS, load_variant
from lavis_lstp.models.weights.parts import part_of, prefixes_of

TYPES = {
    "blip2_t5": "pretrain_flant5xl",
    "blip2_opt": "pretrain_opt2.7b",
    "blip2_t5_instruct": "flant5xl",
    "blip2_vicuna_instruct": "vicuna7b",
}
END = {"blip2_opt": "\n", "blip2_vicuna_instruct": "</s>"}
"""What an answer ends with, where the tokenizer does not add it."""
INSTALLED = [
    pytest.param(
        arch,
        marks=pytest.mark.skipif(
            registry.get_model_class(arch) is None, reason=f"the installed LAVIS has no {arch}; its git main has"
        ),
    )
    for arch in TYPES
]
QUESTIONS = ["what is the red square ?", "who moves ?", "which is the first blue shape ?"]
ANSWERS = ["left", "red circle", "no"]
PROMPTS = dict.fromkeys(TYPES, "question : {question} short answer :") | {"blip2_opt": "{question}"}
"""The tiny OPT reads letters, and not many."""
TRAIN = ["qformer", "query_tokens", "projection"]
ONE_FRAME = {"name": "uniform", "context": 0, "num_selected": 1, "span_key": "span"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Tiny weights in the working directory, with a LAVIS checkpoint per model: what the published ones hold."""
    with lavis_tiny.hub(tmp_path_factory.mktemp("hub")) as root:
        if registry.get_model_class("blip2_vicuna_instruct"):
            lavis_tiny.write_vicuna(root / "tiny-vicuna")
        for arch in (param.values[0] for param in INSTALLED if registry.get_model_class(param.values[0])):
            state = lavis_tiny.build(arch, root).state_dict()
            elsewhere = ("visual_encoder.", f"{ARCHS[arch]}_model.")  # published separately
            save = {key: value for key, value in state.items() if not key.startswith(elsewhere)}
            torch.save({"model": save}, root / f"{arch}.pth")
        yield root


def overrides(root, arch: str, **more) -> dict:
    """What makes the type's YAML tiny, for LAVIS and for `model.backbone.config`."""
    drop = ("arch", "load_finetuned", "vit_model", "vit_precision", "freeze_vit")  # as in the YAML
    tiny = {key: value for key, value in lavis_tiny.config(arch, root).items() if key not in drop}
    return {**tiny, "pretrained": str(root / f"{arch}.pth"), "max_txt_len": 64, **more}


def model_config(root, arch: str = "blip2_t5", backbone: dict | None = None, **more) -> dict:
    config = OmegaConf.to_container(load_variant(CONFIGS / "lstp_tiny.yaml").model)
    config["backbone"] = {
        "source": "lavis",
        "arch": arch,
        "model_type": TYPES.get(arch),
        "dtype": "float32",
        "max_text_tokens": 32,
        "config": overrides(root, arch),
        **(backbone or {}),
    }
    prompt = PROMPTS.get(arch, "{question}")
    config.update(prompt=prompt, answer_template="{answer}" + END.get(arch, ""), train=TRAIN)
    return {**config, **more}


def build(*args, **kwargs) -> LSTP:
    return LSTP.from_config(model_config(*args, **kwargs))


def lavis_model(root, arch: str):
    """LAVIS's own way to the same model."""
    model_class = registry.get_model_class(arch)
    config = OmegaConf.load(model_class.default_config_path(TYPES[arch])).model
    model = model_class.from_config(OmegaConf.merge(config, overrides(root, arch))).float().eval()
    if arch == "blip2_vicuna_instruct":
        begin_as_told(model.llm_tokenizer)  # as it is without help where transformers is older than 5
    return model


def batch(lengths=(1, 1), seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), 3, IMAGE_SIZE, IMAGE_SIZE)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    frames = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return {
        "frames": frames * mask[:, :, None, None, None].to(torch.uint8),
        "frame_mask": mask,
        "text_input": QUESTIONS[: len(lengths)],
        "text_output": ANSWERS[: len(lengths)],
        "question_id": [f"q{i}" for i in range(len(lengths))],
        "video_id": [f"v{i}" for i in range(len(lengths))],
    }


def lavis_samples(samples: dict, arch: str) -> dict:
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGE_MEAN, IMAGE_STD))
    prompts = [PROMPTS[arch].replace("{question}", question) for question in samples["text_input"]]
    return {
        "image": (samples["frames"][:, 0] / 255 - mean) / std,
        "text_input": prompts,
        "prompt": prompts,
        "text_output": samples["text_output"],
    }


# ---- LAVIS's behaviour


def one_row(samples: dict, i: int) -> dict:
    return {key: value[i : i + 1] for key, value in samples.items()}


def for_opt(theirs, samples: dict) -> dict:
    """LAVIS trains an OPT on whole texts but for the prompt of its config, and asks with one prompt for all."""
    ((prompt,), (answer,)) = samples["prompt"], samples["text_output"]
    theirs.prompt = prompt
    theirs.prompt_length = theirs.opt_tokenizer(prompt, return_tensors="pt").attention_mask.sum(1)
    return {**samples, "text_input": [f"{prompt}{answer}"], "prompt": prompt}


@pytest.mark.parametrize("arch", INSTALLED)
def test_loss_of_one_frame_is_that_of_lavis(hub, arch):
    model, theirs, samples = build(hub, arch, selector=ONE_FRAME).eval(), lavis_model(hub, arch), batch()
    given = lavis_samples(samples, arch)
    if arch == "blip2_opt":
        samples, given = one_row(samples, 1), for_opt(theirs, one_row(given, 1))
    with torch.no_grad():
        ours, expected = model(samples)["loss"], theirs(given)["loss"]
    assert ours.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("arch", INSTALLED)
def test_greedy_answer_to_one_frame_is_that_of_lavis(hub, arch):
    model, theirs, samples = build(hub, arch, selector=ONE_FRAME).eval(), lavis_model(hub, arch), batch((1, 1, 1))
    given = lavis_samples(samples, arch)
    asked = [for_opt(theirs, one_row(given, i)) for i in range(3)] if arch == "blip2_opt" else [given]
    expected = []
    for part in asked:
        length = 10
        if model.backbone.language_model.__module__.endswith(("opt.modeling_opt", "modeling_llama")):
            # git main counts queries and prompt
            text = model.backbone.tokenizer(part["prompt"], padding=True, return_tensors="pt")
            length += QUERIES + text.input_ids.shape[-1]
        expected += theirs.generate(part, num_beams=1, repetition_penalty=1.0, max_length=length)
    assert model.generate(samples, num_beams=1, max_length=10) == expected
    assert len(set(expected)) == 3, "every picture and question should get words of its own"


@pytest.mark.skipif(not registry.get_model_class("blip2_vicuna_instruct"), reason="needs LAVIS's git main")
def test_texts_begin_as_instructblip_was_trained(hub):
    """LAVIS makes </s> the begin mark; [PAD] is the last id; 0 ends an answer, too."""
    backbone = build(hub, "blip2_vicuna_instruct").backbone
    tokenizer, embeddings = backbone.tokenizer, backbone.language_model.get_input_embeddings()
    assert tokenizer("what is red ?").input_ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.pad_token_id == len(tokenizer) - 1 == len(embeddings.weight) - 1
    assert backbone._end_ids == [2, 0] and backbone.qformer_tokenizer is backbone.model.tokenizer


def test_an_opt_ends_with_a_line_break(hub):
    backbone = build(hub, "blip2_opt").backbone
    assert backbone.tokenizer.decode(backbone._end_ids) == "\n"


def test_pictures_and_prompts_matter(hub):
    model, samples = build(hub).eval(), batch()
    with torch.no_grad():
        loss = model(samples)["loss"]
        other_frames = model({**samples, "frames": 255 - samples["frames"]})["loss"]
        other_prompt = model({**samples, "text_input": ["no ?", "yes ?"]})["loss"]
    assert len({round(value.item(), 4) for value in (loss, other_frames, other_prompt)}) == 3


@pytest.mark.parametrize("arch", INSTALLED)
def test_options_are_as_likely_as_when_learnt(hub, arch):
    """Its classes keep what they have read in their own ways."""
    model = build(hub, arch, selector=ONE_FRAME).eval()
    samples = {**batch(), "options": [["red", "a blue circle"], ["star"]]}
    scored = model.score_options(samples)["option_log_prob"]
    for option, found in zip(samples["options"][0], scored[0], strict=True):
        one = {**one_row(samples, 0), "text_output": [option]}
        with torch.no_grad():
            assert found["mean"] == pytest.approx(-float(model(one)["lm_loss"]), abs=2e-4)


@pytest.mark.parametrize("fusion", ["concat", "mean"])
@pytest.mark.parametrize("arch", INSTALLED)
def test_videos_of_several_lengths(hub, arch, fusion):
    """Selected by the sampler; a row of a batch is what it is alone."""
    model = build(hub, arch, fusion=fusion).eval()
    samples = batch((8, 5, 1))
    together, located = model.answer(samples), model.locate(samples)
    assert torch.equal(located["frame_index"], together["frame_index"]) and located["span"].shape == (3, 2)
    assert together["frame_index"].shape == (3, 4) and len(set(together["prediction"])) > 1
    for i, length in enumerate((8, 5, 1)):
        cut = ("frames", "frame_mask")
        row = {key: value[i : i + 1, :length] if key in cut else value[i : i + 1] for key, value in samples.items()}
        assert model.answer(row)["prediction"] == together["prediction"][i : i + 1]


# ---- training


@pytest.mark.parametrize("arch", INSTALLED)
def test_two_steps_change_and_save_what_is_trained_and_nothing_else(hub, arch, tmp_path):
    model, samples = build(hub, arch).train(), batch((8, 5))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(samples)["loss"].backward()
        optimizer.step()
    prefixes = prefixes_of(model)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {part_of(key, prefixes) for key in changed} == set(TRAIN)
    assert set(model.trained_parts()) == set(TRAIN) and all(model.trained_parts().values())

    saved = {key: value.contiguous() for key, value in model.trainable_state_dict().items()}
    assert {part_of(key, prefixes) for key in saved} == set(TRAIN) and changed <= saved.keys()
    save_file(saved, tmp_path / "model.safetensors")
    fresh = build(hub, arch, checkpoint=str(tmp_path / "model.safetensors"))
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    assert load_file(tmp_path / "model.safetensors").keys() == saved.keys()


@pytest.mark.parametrize("arch", INSTALLED)
def test_lora_on_its_language_model(hub, arch, tmp_path):
    lora = {"r": 2, "alpha": 4, "dropout": 0.0, "targets": None}
    plain, model, samples = build(hub, arch).eval(), build(hub, arch, lora=lora, train=["lora"]), batch((8, 5))
    with torch.no_grad():
        assert model.eval()(samples)["loss"].item() == pytest.approx(plain(samples)["loss"].item(), abs=1e-6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(samples)["loss"].backward()
        optimizer.step()
    saved = model.trainable_state_dict()
    assert saved and all(".lora_" in key for key in saved)
    save_file(saved, tmp_path / "lora.safetensors")
    fresh = build(hub, arch, lora=lora, train=["lora"], checkpoint=str(tmp_path / "lora.safetensors")).eval()
    with torch.no_grad():
        loss = model.eval()(samples)["loss"].item()
        assert fresh(samples)["loss"].item() == loss != plain(samples)["loss"].item()
    answers = model.generate(samples)
    model.backbone.merge_lora()
    assert model.generate(samples) == answers


@pytest.mark.parametrize("arch", INSTALLED)
def test_gradient_checkpointing_changes_nothing(hub, arch):
    results = []
    for on in (False, True):
        model = build(hub, arch, train=[*TRAIN, "vision"], backbone={"gradient_checkpointing": on}).eval()  # no dropout
        loss = model(batch((8, 5)))["loss"]
        loss.backward()
        results.append((loss, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
        stages = (model.backbone.vision_model, model.backbone.qformer, model.backbone.language_model)
        for stage in stages:  # two layers each, and T5 has two stacks
            inside = {id(module) for module in stage.modules()}
            assert sum(id(layer) in inside for layer in model.backbone.layers()) in (2, 4)
    (loss, gradients), (again, repeated) = results
    assert loss.item() == again.item() and gradients.keys() == repeated.keys()
    for key, value in gradients.items():
        torch.testing.assert_close(repeated[key], value, msg=key)


def test_what_lavis_froze_can_learn(hub):
    """LAVIS freezes its vision tower and takes its `train` away; here `train` of the config decides."""
    model = build(hub, train=["vision"], backbone={"config": overrides(hub, "blip2_t5", freeze_vit=True)}).train()
    tower = model.backbone.model.visual_encoder
    assert all(module.training for module in (*tower.modules(), model.backbone.model.ln_vision))
    assert not any(module.training for module in model.backbone.language_model.modules())
    model(batch())["loss"].backward()
    learning = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {key.split(".")[2] for key in learning} == {"visual_encoder", "ln_vision"}
    assert not any(module.training for module in model.eval().modules())


def test_what_lavis_lets_learn_is_frozen(hub):
    """A type that was finetuned does not freeze its tower."""
    model = build(hub, backbone={"config": overrides(hub, "blip2_t5", freeze_vit=False)}).train()
    tower = model.backbone.model.visual_encoder
    assert not any(p.requires_grad for p in tower.parameters()) and not any(m.training for m in tower.modules())


def test_frozen_weights_in_bfloat16(hub):
    model, exact, samples = build(hub, backbone={"dtype": "bfloat16"}), build(hub), batch((8, 5))
    backbone = model.backbone
    assert backbone.vision_model.cls_token.dtype == backbone.language_model.dtype == torch.bfloat16
    assert backbone.query_tokens.dtype == backbone.qformer.dtype == torch.float32
    with torch.no_grad():
        loss, expected = model.eval()(samples)["loss"].item(), exact.eval()(samples)["loss"].item()
    assert loss == pytest.approx(expected, rel=0.02) and loss != expected
    assert len(model.answer(samples)["prediction"]) == 2
    model.train()(samples)["loss"].backward()
    assert backbone.projection.weight.grad.isfinite().all()


# ---- errors


def failing(*args, error=ConfigError, **kwargs) -> str:
    with pytest.raises(error) as caught:
        build(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_unknown_names(hub):
    assert "'blip2_t6'" in (line := failing(hub, backbone={"arch": "blip2_t6"})) and "did you mean 'blip2_t5'" in line
    line = failing(hub, backbone={"model_type": "flant5xl"})
    assert "blip2_t5 (model.backbone.model_type)" in line and "pretrain_flant5xl_vitL" in line
    assert "model_type" in failing(hub, backbone={"model_type": None})
    wrong = {**overrides(hub, "blip2_t5"), "num_query_tokens": 4}
    assert "did you mean 'num_query_token'" in failing(hub, backbone={"config": wrong})
    assert "known: endpoint, hub, lavis, transformers" in failing(hub, backbone={"source": "huggingface"})
    assert "model.backbone.attention" in failing(hub, backbone={"attention": "sdpa"})


@pytest.mark.skipif(bool(registry.get_model_class("blip2_t5_instruct")), reason="the installed LAVIS has every model")
def test_a_model_that_this_lavis_does_not_have(hub):
    line = failing(hub, backbone={"arch": "blip2_vicuna_instruct", "model_type": "vicuna7b"})
    assert "it has blip2_t5, blip2_opt" in line and "pip install --no-deps git+https" in line


def test_incomplete_checkpoint(hub, tmp_path):
    state = torch.load(hub / "blip2_t5.pth", weights_only=True)["model"]
    path = tmp_path / "half.pth"

    def message(**lacking):
        torch.save({"model": lacking["state"]}, path)
        return failing(hub, error=WeightsError, backbone={"weights": str(path)})

    line = message(state={key: value for key, value in state.items() if not key.startswith("t5_proj.")})
    assert "half.pth' lacks 2 weights" in line and "t5_proj.bias" in line
    tower = {"visual_encoder.cls_token": torch.zeros(1, 1, 32)}  # a tower is there as a whole, or not at all
    assert "visual_encoder.blocks.0" in message(state={**state, **tower})
    assert "size mismatch" in message(state={**state, "query_tokens": torch.zeros(1, 7, 32)})
    assert "lacks" in message(state={})


def test_a_checkpoint_that_is_none(hub, tmp_path):
    for content, said in (({"other": 1}, "'model'"), ({"model": Path_that_runs()}, "weights_only")):
        torch.save(content, tmp_path / "x.pth")
        line = failing(hub, error=WeightsError, backbone={"weights": str(tmp_path / "x.pth")})
        assert said in line.lower() and "x.pth" in line
    assert "LAVIS_LSTP_WEIGHTS" in failing(hub, error=WeightsError, backbone={"weights": "nowhere.pth"})


class Path_that_runs:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


def test_offline(hub, tmp_path, monkeypatch):
    """The type's own checkpoint is a URL: from LAVIS's cache, or an error that says where to put it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    own = {key: value for key, value in overrides(hub, "blip2_t5").items() if key != "pretrained"}
    line = failing(hub, error=WeightsError, backbone={"config": own})
    path = tmp_path / "hub" / "checkpoints" / "blip2_pretrained_flant5xl.pth"
    assert str(path) in line and "https://storage.googleapis.com" in line
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((hub / "blip2_t5.pth").read_bytes())
    assert build(hub, backbone={"config": own}).backbone.num_query_tokens == QUERIES
    line = failing(hub, error=WeightsError, backbone={"config": {**own, "t5_model": "google/flan-t5-xl"}})
    assert "google/flan-t5-xl" in line
