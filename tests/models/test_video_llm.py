"""Models of transformers behind the seam, each as a tiny random one in the hub's layout."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file
from test_lstp import batch, drained, row, said

from lavis_lstp.commands.export import export
from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.models.answer import video_llm
from lavis_lstp.models.lstp import LSTP
from lavis_lstp.models.weights.parts import part_of, prefixes_of
from lavis_lstp.testing.tiny_backbones import Sizes, write_backbone
from lavis_lstp.testing.tiny_video_llms import VIDEO_LLMS, can_be_written, write_video_llm

QWEN = ("qwen2_5_vl", "qwen3_vl")
NAMES = [*VIDEO_LLMS, "instructblipvideo"]
END = {"instructblipvideo": "</s>"} | {name: model.end for name, model in VIDEO_LLMS.items()}
EXPORTED = ("qwen3_vl", "smolvlm", "instructblipvideo")
"""Exported in each run of the tests; the others are slow."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name -> its folder, written once."""
    root = tmp_path_factory.mktemp("models")

    @lru_cache
    def written(name: str) -> Path:
        if name == "instructblipvideo":
            write_instructblipvideo(root)
        elif not can_be_written():
            pytest.skip("processors of transformers 4 are told other things")
        else:
            write_video_llm(root / name, name=name, spread=0.2)
        return root / name

    return written


def write_instructblipvideo(root: Path) -> None:
    """As users make one: InstructBLIP's weights in the other class, and a mark more in the tokenizer."""
    image = root / "instructblip"
    write_backbone(image, name="instructblip-vicuna-7b", sizes=Sizes(64, 16), seed=0, dtype="float32")
    model = transformers.InstructBlipVideoForConditionalGeneration.from_pretrained(image)
    square = {"height": 64, "width": 64}
    processor = transformers.InstructBlipVideoProcessor(
        transformers.InstructBlipVideoVideoProcessor(size=square),
        transformers.AutoTokenizer.from_pretrained(image),
        transformers.AutoTokenizer.from_pretrained(image / "qformer_tokenizer"),
        num_query_tokens=model.config.num_query_tokens,
    )
    model.resize_token_embeddings(len(processor.tokenizer))
    model.config.video_token_index = processor.tokenizer.convert_tokens_to_ids("<video>")
    model.language_model.generation_config.pad_token_id = model.generation_config.pad_token_id = 0
    model.save_pretrained(root / "instructblipvideo")
    processor.save_pretrained(root / "instructblipvideo")


def settings(path: Path, name: str, **overrides) -> dict:
    backbone = {"source": "transformers", "weights": str(path), "dtype": "float32", **overrides.pop("backbone", {})}
    return {
        "backbone": backbone,
        "prompt": "{question}",
        "answer_template": "{answer}" + END[name],
        "train": [],
        "selector": {"name": "uniform", "num_selected": 3},
        "generation": {"max_new_tokens": 6},
        **overrides,
    }


@pytest.fixture(scope="module")
def built(folder):
    """name -> a model that nobody changes."""
    return lru_cache(lambda name: LSTP.from_config(settings(folder(name), name)).eval())


def samples(lengths=(8, 5, 1)) -> dict:
    made = batch(lengths)
    made["frame_times"] = torch.arange(max(lengths))[None] * torch.tensor([[1.5], [0.7], [0.0]])[: len(lengths)]
    return made


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_answered_as_alone(built, name):
    """Videos of eight and five frames, and a text."""
    model, mixed = built(name), samples((8, 2, 0))
    together = model.answer(mixed)
    assert len({log_prob["sum"] for log_prob in together["log_prob"]}) == 3
    unseen = model.answer({**mixed, "frames": 255 - mixed["frames"]})["log_prob"]
    assert unseen[:2] != together["log_prob"][:2] and unseen[2] == together["log_prob"][2]
    for i in range(3):
        alone = model.answer(row_of(mixed, i))
        assert alone["prediction"] == together["prediction"][i : i + 1]
        assert math.isclose(alone["log_prob"][0]["sum"], together["log_prob"][i]["sum"], abs_tol=2e-3)


def row_of(samples: dict, i: int) -> dict:
    real = max(1, int(samples["frame_mask"][i].sum()))
    return {**row(samples, i), **{k: samples[k][i : i + 1, :real] for k in ("frames", "frame_mask", "frame_times")}}


@pytest.mark.parametrize("name", NAMES)
def test_loss_log_probs_and_answers_agree(built, name):
    """What greedy search says is what the scorer calls greedy, and as likely; the loss is that of all tokens."""
    model, given = built(name), samples()
    told = model.answer(given)
    template = END[name]
    options = [[text, "red", "a blue star"] for text in told["prediction"]]
    scored = model.score_options({**given, "options": options})["option_log_prob"]
    reading = model.look(given, told["frame_index"], told["prompt"])
    answers = [f"{answer}{template}" for answer in given["text_output"]]
    sums, counts, _ = reading.log_probs([0, 1, 2], answers)
    loss = reading.loss(answers)
    assert loss.item() == pytest.approx(-(sums.sum() / counts.sum()).item(), abs=1e-4)
    ids = model.backbone.tokenizer("red" + template, add_special_tokens=False)["input_ids"]
    assert all(len(row) == 3 and row[1]["tokens"] == len(ids) > 1 for row in scored)
    assert model.backbone.answer_ids(["red" + template]) == [ids]


@pytest.mark.parametrize("name", VIDEO_LLMS)
def test_beams_are_as_likely_as_they_say(built, name):
    """Rows and the frames behind them stay together when they are repeated for each beam."""
    model, given = built(name), samples()
    tokenizer = model.backbone.tokenizer
    letters = set(tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"])
    others = [i for i in range(len(tokenizer)) if i not in letters]
    found = model.backbone.look(*_shown(model, given)).answers(num_beams=3, max_new_tokens=4, suppress_tokens=others)
    sums, counts, _ = model.backbone.look(*_shown(model, given)).log_probs([0, 1, 2], found.texts)
    assert counts.tolist() == found.counts.tolist() == [4, 4, 4]
    assert torch.allclose(sums, found.log_probs, atol=2e-3)


def _shown(model: LSTP, given: dict) -> tuple:
    from lavis_lstp.batch import chosen_frames

    index = model.locate(given)["frame_index"]
    frames, which, times = chosen_frames(given, index)
    return frames, which, model.prompts(given), times


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("drawn", [{}, {"do_sample": True, "top_k": 20}])
def test_pieces_of_a_stream_are_the_answers(built, name, drawn):
    model, given = built(name), samples()
    pieces, result = drained(model.stream(given, **drawn))
    whole = model.answer(given, **drawn)
    assert said(pieces) == whole["prediction"] == result["prediction"]
    assert result["log_prob"] == whole["log_prob"]


# ---- models with a Q-Former, which have no chat template -----------------------------------------------------------


def test_instructblipvideo_answers_as_transformers_class_does(folder, built):
    """By its own processor, which knows four frames; ours takes any number of them."""
    path, given = folder("instructblipvideo"), samples((4, 4, 4))
    model = transformers.InstructBlipVideoForConditionalGeneration.from_pretrained(path).eval()
    processor = transformers.AutoProcessor.from_pretrained(path)
    uniform = {"selector": {"name": "uniform", "num_selected": 4}}
    found = LSTP.from_config(settings(path, "instructblipvideo", **uniform)).eval().answer(given, max_new_tokens=6)
    for i in range(3):
        inputs = processor(images=[given["frames"][i]], text=given["text_input"][i], return_tensors="pt")
        made = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        new = made.sequences[:, -len(made.logits) :]
        assert found["prediction"][i] == processor.tokenizer.decode(new[0], skip_special_tokens=True).strip()
        likely = torch.stack(made.logits, 1)[0].log_softmax(-1).gather(1, new[0, :, None]).sum()
        assert found["log_prob"][i]["sum"] == pytest.approx(likely.item(), abs=2e-3)


@pytest.mark.parametrize(
    ("name", "family"), [("instructblip-vicuna-7b", "instructblip"), ("blip2-flan-t5-xl", "blip2")]
)
def test_pictures_models_with_a_qformer_are_those_of_source_hub(tmp_path, name, family):
    write_backbone(tmp_path / "model", name=name, sizes=Sizes(64, 16), seed=0, dtype="float32")
    section, given = settings(tmp_path / "model", "instructblipvideo"), samples()
    hub = {**section, "fusion": "concat", "backbone": {**section["backbone"], "source": "hub", "family": family}}
    one, two = (LSTP.from_config(each).eval().answer(given) for each in (section, hub))
    assert one["prediction"] == two["prediction"] and one["log_prob"] == two["log_prob"]


def test_instructblipvideo_reads_times_and_no_marks(folder, built, caplog):
    path = folder("instructblipvideo")
    model = LSTP.from_config(settings(path, "instructblipvideo", backbone={"times_in_prompt": True}))
    assert "not told when" not in caplog.text
    reading = model.backbone.look(
        torch.zeros(2, 3, 64, 64), torch.tensor([[0, 1]]), ["what?"], torch.tensor([[1.0, 2.5]])
    )
    assert reading.prompts == ["The frames show these seconds of the video: 1.0, 2.5.\nwhat?"]
    with pytest.raises(ConfigError, match=r"set it to '\{question\}'"):
        LSTP.from_config({**settings(path, "instructblipvideo"), "prompt": "USER: <video>\n{question}"}).answer(
            samples()
        )
    assert "not told when" in caplog.text


# ---- true times -----------------------------------------------------------------------------------------------------

CHOSEN = (40, 69, 110, 190, 220, 224, 294, 295)
"""Frames of a 30 fps video; the mean seconds of each two are 1.8, 5.0, 7.4, 9.8."""


def read(model: LSTP, times_s: list[float], prompt: str = "what?") -> dict:
    frames = torch.zeros(len(times_s), 3, 64, 64, dtype=torch.uint8)
    which = torch.arange(len(times_s))[None]
    return model.backbone.look(frames, which, [prompt], torch.tensor([times_s])).groups[0]


def text_of(model: LSTP, times_s: list[float], **more) -> str:
    return model.backbone.tokenizer.decode(read(model, times_s, **more).tokens["input_ids"][0])


def test_qwen3_writes_the_seconds_of_the_file(built):
    """Facts of the published processor: true times, and not 0.2, 1.2, 2.2, 3.2 of a list at one frame a second."""
    text = text_of(built("qwen3_vl"), [frame / 30 for frame in CHOSEN])
    told = [word.split(" seconds>")[0] for word in text.split("<") if "seconds>" in word]
    assert told == ["1.8", "5.0", "7.4", "9.8"]
    uneven = text_of(built("qwen3_vl"), [0.0, 0.25, 61.0, 62.0])  # of a variable frame rate
    assert "<0.1 seconds>" in uneven and "<61.5 seconds>" in uneven


def test_smolvlm_writes_minutes_and_seconds(built):
    text = text_of(built("smolvlm"), [1.0, 61.5, 600.0])
    assert all(f"Frame from {time}:" in text for time in ("00:01", "01:01", "10:00")) and "0:10:00" in text


def test_qwen2_5_places_frames_at_their_seconds(built):
    """Two positions a second, of the first frame of each pair; the text goes on behind them."""
    model = built("qwen2_5_vl")
    group = read(model, [frame / 30 for frame in CHOSEN])
    video = group.tokens["mm_token_type_ids"][0] == 2
    text, time, height, _ = group.positions[:, 0]
    begin = int(height[video].min())
    assert sorted(set((time[video] - begin).tolist())) == [int(2 * frame / 30) for frame in CHOSEN[::2]]
    after = int(video.nonzero()[-1]) + 1
    assert time[after] == height[after] == time[video].max() + 1 and text[after] == after
    # as transformers has them where frames are evenly spaced from the start
    own, _ = model.backbone.model.model.get_rope_index(
        group.tokens["input_ids"],
        mm_token_type_ids=group.tokens["mm_token_type_ids"],
        video_grid_thw=group.frames["video_grid_thw"],
        second_per_grid_ts=[1.0],
    )
    even = read(model, [0.5 * i for i in range(8)])
    assert torch.equal(even.positions[1:, 0, :after], own[:, 0, :after])


@pytest.mark.parametrize("name", VIDEO_LLMS)
def test_who_is_told_times_by_itself(built, name):
    assert built(name).backbone.tells_times() == (name in (*QWEN, "smolvlm"))


def test_a_model_that_cannot_be_told_reads_them_in_the_prompt(folder, built, caplog):
    times_s = [frame / 30 for frame in CHOSEN]
    assert "seconds" not in text_of(built("internvl"), times_s)
    asked = settings(folder("internvl"), "internvl", backbone={"times_in_prompt": True})
    caplog.clear()
    told = text_of(LSTP.from_config(asked), times_s)
    assert "The frames show these seconds of the video: 1.3, 2.3, 3.7, 6.3, 7.3, 7.5, 9.8, 9.8.\nwhat?" in told
    assert "not told when" not in caplog.text


def test_frames_without_times_are_not_given_any(built):
    """Nobody knows them, so that they are images and not a video that begins at 0 s."""
    model, given = built("qwen3_vl"), batch((4, 4, 4))
    frames, which, prompts, times_s = _shown(model, given)
    assert times_s is None
    (group,) = model.backbone.look(frames, which, prompts).groups
    assert "image_grid_thw" in group.frames and "video_grid_thw" not in group.frames


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["<|video_pad|>", "<|im_end|>", "<|im_start|>"])
def test_a_question_with_a_mark_of_the_model_is_refused(built, mark):
    with pytest.raises(ConfigError, match="a mark of the model's own") as caught:
        built("qwen3_vl").answer({**samples(), "text_input": [f"ignore this{mark}", "b", "c"]})
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="stands for frames"):
        built("qwen3_vl")({**samples(), "text_output": ["<|video_pad|>", "b", "c"]})


def test_the_published_prompt_is_refused_with_the_remedy(folder):
    model = LSTP.from_config(
        {**settings(folder("llava_onevision"), "llava_onevision"), "prompt": "USER: <video>\n{question}"}
    )
    with pytest.raises(ConfigError, match=r"set it to '\{question\}'"):
        model.answer(samples())


def test_long_questions_are_cut_and_frames_are_not(folder):
    model = LSTP.from_config(settings(folder("qwen3_vl"), "qwen3_vl", backbone={"max_text_tokens": 5}))
    assert "abcde<|im_end|>" in text_of(model, [0.0, 1.0], prompt="abcdefgh")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"weights": "nowhere/model"}, "missing weights"),
        ({"weights": None}, "model.backbone.weights is empty"),
        ({"dtype": "float8"}, "dtype"),
        ({"quantization": "4bit"}, "needs the package bitsandbytes|needs a CUDA device"),
        ({"config": {"num_query_tokens": 4}}, "config is for source hub"),
    ],
)
def test_settings_that_cannot_be_followed(folder, monkeypatch, change, line):
    from lavis_lstp.models.weights import hub

    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    with pytest.raises((ConfigError, WeightsError), match=line) as caught:
        LSTP.from_config(settings(folder("qwen3_vl"), "qwen3_vl", backbone=change))
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_all_there(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(folder("qwen3_vl"), tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights.pop(next(key for key in weights if "q_proj" in key))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="lacks 1 weights, first .*q_proj"):
        LSTP.from_config(settings(broken, "qwen3_vl"))


@pytest.mark.parametrize("name", VIDEO_LLMS)
def test_only_layers_of_the_language_model_are_quantised(built, monkeypatch, name):
    """By transformers' own rule; bitsandbytes and its device are not needed to ask it."""
    seen, model = [], built(name).backbone
    from transformers.quantizers.quantizers_utils import should_convert_module

    monkeypatch.setattr(video_llm, "quantization_config", lambda *_, skipped: seen.extend([*skipped, "lm_head"]))
    monkeypatch.setattr(video_llm, "model_and_processor", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        video_llm.build(weights="a/model", quantization="4bit")
    linear = [key for key, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    left = [f"model.{key}" for key in linear if should_convert_module(key, seen)]
    assert left and all(key.startswith(model.PARTS["language_model"][0]) for key in left)


# ---- training -------------------------------------------------------------------------------------------------------

LORA = {"r": 4, "alpha": 8, "dropout": 0.1, "targets": None}


def parts_with_gradients(model: LSTP) -> set[str | None]:
    prefixes = prefixes_of(model)
    return {part_of(key, prefixes) for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def shake(model: LSTP) -> None:
    """As if adapters had learnt something."""
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [["lora"], ["projection", "lora"], ["vision", "projection", "language_model"]])
def test_what_is_named_learns_and_is_all_a_checkpoint_holds(folder, tmp_path, name, train):
    """With checkpointed activations the gradients are the same; adapters can be merged."""
    given, lora = samples((8, 4, 0)), LORA if "lora" in train else None
    whole = settings(folder(name), name, train=train, lora=lora)
    model = LSTP.from_config(whole)
    shake(model)
    model.eval()(given)["loss"].backward()
    assert parts_with_gradients(model) == set(train)
    saving = {**whole, "backbone": {**whole["backbone"], "gradient_checkpointing": True}}
    other = LSTP.from_config(saving)
    shake(other)
    other.eval()(given)["loss"].backward()
    for (key, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), key
        assert one.grad is None or torch.allclose(one.grad, two.grad, atol=1e-6), key

    state = model.trainable_state_dict()
    assert state and {part_of(key, prefixes_of(model)) for key in state} == set(train)
    torch.save(state, tmp_path / "trained.pt")
    before = model(given)["loss"].item()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert other.load_checkpoint(str(tmp_path / "trained.pt")) == sorted(train)
    assert other(given)["loss"].item() == pytest.approx(before, abs=1e-6)
    if lora:
        other.backbone.merge_lora()
        assert not any(".lora_" in key for key in other.state_dict())
        assert other(given)["loss"].item() == pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_lower_the_loss(folder, name):
    torch.manual_seed(0)
    model = LSTP.from_config(settings(folder(name), name, train=["projection", "lora"], lora=LORA)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(6):
        loss = model(samples())["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1 and all(map(math.isfinite, losses))


@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm"])
def test_half_precision_computes_what_float32_does(folder, built, name):
    """What learns is held in float32 beside frozen bfloat16 weights, without autocast around it."""
    half = settings(folder(name), name, train=["projection", "lora"], lora=LORA, backbone={"dtype": "bfloat16"})
    model = LSTP.from_config(half).eval()
    loss = model(samples())["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(built(name)(samples())["loss"].item(), abs=0.1)
    assert len(model.answer(samples())["prediction"]) == 3


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_labelled_one_by_one(built, name):
    """By the answer that each frame alone gives, as an image."""
    model, given = built(name), samples((4, 3, 1))
    prompts = model.prompts(given)
    said = [
        model.backbone.look(given["frames"][i, t : t + 1], torch.zeros(1, 1).long(), [prompts[i]])
        .answers(max_new_tokens=6, scored=False)
        .texts[0]
        for i, t in ((0, 2), (1, 1))
    ]
    given["text_output"] = [*said, "red"]
    scores = model.pseudo_scores(given)
    assert scores[0, 2] == 1 and scores[1, 1] == 1 and not scores[2].any()
    assert torch.equal(scores, model.pseudo_scores(given, rows=2))


@pytest.mark.parametrize(
    "name", [*EXPORTED, *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n not in EXPORTED)]
)
def test_an_export_is_what_plain_transformers_loads(folder, tmp_path, name):
    """Adapters merged into the language model, the processor beside it; our own loader answers alike."""
    sampler = {"hidden_size": 24, "text_width": 24, "num_layers": 2, "num_heads": 2, "fusion_layer": 1, "flow_size": 32}
    small = {"sampler": {**sampler, "weights": None, "tokenizer": None}, "flow": {"name": "dis"}}
    whole = settings(folder(name), name, train=["projection", "lora"], lora=LORA, **small, arch="lstp_video_llm")
    trained = LSTP.from_config(whole)
    shake(trained)
    run = tmp_path / "run"
    run.mkdir()
    save_file({k: v.contiguous() for k, v in trained.trainable_state_dict().items()}, run / "model.safetensors")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": whole}))
    lines = export([str(run)], tmp_path / "out", recipe=str(tmp_path / "recipe.yaml"), dtype="float32")
    assert "LoRA merged" in lines[0]
    plain = type(trained.backbone.model)  # transformers 4 has no AutoModel for InstructBlipVideo
    _, found = plain.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.chat_template == getattr(trained.backbone, "processor", processor).chat_template
    again = LSTP.from_config(settings(tmp_path / "out", name)).eval()
    one, two = (model.eval().answer(samples()) for model in (trained, again))
    assert one["prediction"] == two["prediction"]
    sums = ([row["sum"] for row in found["log_prob"]] for found in (one, two))
    assert torch.allclose(*map(torch.tensor, sums), atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [["lora", "projection"], ["vision", "projection", "language_model"]])
def test_ranks_that_draw_other_kinds_of_samples_learn_and_answer_alike(ranks, folder, tmp_path, name, train):
    """ZeRO-0, 2 and 3 on two processes: one rank all text, the other all video, and what else can meet."""
    pytest.importorskip("deepspeed")
    lora = {**LORA, "dropout": 0.0} if "lora" in train else None
    section = settings(folder(name), name, train=train, lora=lora)
    found = {}
    kinds = [0, 1, 3, 5] if name in QWEN else [0, 1, 3, 4]  # images and videos of other lengths, where they go together
    for stage in (0, 2, 3):
        options = {"model": section, "stage": stage, "output": str(tmp_path / f"zero{stage}"), "kinds": kinds}
        assert ranks.run(2, "draws", options) == [0, 0], f"stage {stage}: a rank hangs or fails"
        found[stage] = [json.loads((tmp_path / f"zero{stage}.{rank}").read_text()) for rank in range(2)]
    for stage in (2, 3):
        for whole, divided in zip(found[0], found[stage], strict=True):
            for left, right in zip(whole[:4], divided[:4], strict=True):
                assert left == pytest.approx(right, rel=1e-4, abs=1e-5)
            assert whole[4:8] == divided[4:8]
            for left, right in zip(whole[8:], divided[8:], strict=True):
                assert left == pytest.approx(right, rel=1e-4, abs=1e-4)
