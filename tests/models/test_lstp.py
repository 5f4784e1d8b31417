"""The composed model: losses, answers, checkpoints, for both families and both kinds of language model."""

from __future__ import annotations

import copy

import pytest
import torch
from lavis.models import load_model
from omegaconf import OmegaConf
from safetensors.torch import save_file

from lavis_lstp.errors import AnnotationError, ConfigError, WeightsError
from lavis_lstp.metrics.qa import token_recall
from lavis_lstp.models.answer.fusion import FrameFusion
from lavis_lstp.models.answer.language import IGNORED, _left_padded
from lavis_lstp.models.answer.qformer import Backbone
from lavis_lstp.models.building import sampler_tokenizer
from lavis_lstp.models.lstp import LSTP
from lavis_lstp.models.variants import CONFIGS, load_variant
from lavis_lstp.models.weights.parts import part_of
from lavis_lstp.models.where import chooser

T5 = {
    "model_type": "t5",
    "hidden_size": 64,
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
BACKBONES = [("instructblip", "llama"), ("instructblip", "t5"), ("blip2", "llama"), ("blip2", "t5")]
QUESTIONS = ["what colour is the shape that moves left?", "which shape turns?", "which shape moved first of all?"]
ANSWERS = ["red", "star", "blue circle"]


def model_config(family: str = "instructblip", language: str = "llama", **overrides) -> dict:
    config = OmegaConf.to_container(load_variant(CONFIGS / "lstp_tiny.yaml").model)
    config["backbone"]["family"] = family
    if language == "t5":
        config["backbone"]["config"]["text_config"] = dict(T5)
        config["answer_template"] = "{answer}"
    for key, value in overrides.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return config


def batch(lengths=(8, 8, 8), seed: int = 0) -> dict:
    """Random frames; row i has lengths[i] real ones."""
    generator = torch.Generator().manual_seed(seed)
    count, longest = len(lengths), max(lengths)
    frames = torch.randint(0, 256, (count, longest, 3, 64, 64), generator=generator, dtype=torch.uint8)
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
    return {
        "frames": frames * mask[:, :, None, None, None].to(torch.uint8),
        "frame_mask": mask,
        "text_input": QUESTIONS[:count],
        "text_output": ANSWERS[:count],
        "question_id": [f"q{i}" for i in range(count)],
        "video_id": [f"v{i}" for i in range(count)],
        "span": torch.tensor([[1, 3]] * count),
    }


def row(samples: dict, i: int) -> dict:
    real = int(samples["frame_mask"][i].sum())
    cut = ("frames", "frame_mask")
    return {k: v[i : i + 1, :real] if k in cut else v[i : i + 1] for k, v in samples.items()}


def drained(stream) -> tuple[list[list[str]], dict]:
    """The pieces of `LSTP.stream`, step by step, and what it returns."""
    result = {}

    def steps():
        result.update((yield from stream))

    return list(steps()), result


def said(pieces) -> list[str]:
    return ["".join(words) for words in zip(*pieces, strict=True)]


@pytest.fixture(scope="module")
def tiny() -> LSTP:
    return LSTP.from_config(model_config()).eval()


@pytest.mark.parametrize(("family", "language"), BACKBONES)
def test_loss_reaches_every_trained_part(family, language):
    model = LSTP.from_config(
        model_config(
            family,
            language,
            train=["sampler", "vision", "qformer", "query_tokens", "projection", "language_model"],
            losses=["lm", "span"],
        )
    )
    losses = model.train()(batch())
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(losses["lm_loss"].item() + losses["span_loss"].item())
    reached = {part_of(n) for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"sampler", "vision", "qformer", "query_tokens", "projection", "language_model"}


def test_a_hidden_answer_is_not_learnt(tiny):
    """The data set gives '' for its text, which would be learnt as the answer."""
    with pytest.raises(AnnotationError, match="^question 'q1' has no answer to learn; train on a split with answers$"):
        tiny({**batch((4, 4)), "answer": ["red", None], "text_output": ["red", ""]})


@pytest.mark.parametrize(("family", "language"), BACKBONES)
@pytest.mark.parametrize("fusion", ["concat", "mean"])
def test_answers_do_not_depend_on_the_batch(family, language, fusion):
    """Rows of different lengths: padding of frames, of the prefix and of the text must change nothing."""
    model = LSTP.from_config(model_config(family, language, fusion=fusion)).eval()
    samples = batch((8, 5, 1))
    together = model.answer(samples)
    for i in range(3):
        alone = model.answer(row(samples, i))
        assert alone["prediction"] == together["prediction"][i : i + 1]
        assert torch.equal(alone["frame_index"][0], together["frame_index"][i])
        assert torch.equal(alone["span"][0], together["span"][i])


@pytest.mark.parametrize(("family", "language"), BACKBONES)
def test_lm_loss_is_the_mean_over_answer_tokens(family, language):
    """Against log probabilities gathered by hand, row by row and without any padding."""
    model = LSTP.from_config(model_config(family, language)).eval()
    backbone, total, count = model.backbone, 0.0, 0
    samples = batch()
    with torch.no_grad():
        expected_from = model(samples)["lm_loss"].item()
        for i in range(3):
            one = row(samples, i)
            prompt = model.prompts(one)
            prefix = model.look(one, model.chooser(one).frame_index, prompt).prefix
            answer = model.answer_template.format(answer=ANSWERS[i])
            prompt_ids = torch.tensor([backbone.tokenizer(prompt[0])["input_ids"]])
            answer_ids = torch.tensor([backbone.tokenizer(answer)["input_ids"]])
            lm = backbone.model.language_model
            embed = lm.get_input_embeddings()
            if backbone.is_encoder_decoder:
                inputs = torch.cat([prefix, embed(prompt_ids)], dim=1)
                logits = lm(inputs_embeds=inputs, labels=answer_ids).logits[0]
                target = answer_ids[0]
            else:
                target = answer_ids[0, 1:]  # without the beginning mark
                inputs = torch.cat([prefix, embed(prompt_ids), embed(target[None])], dim=1)
                logits = lm(inputs_embeds=inputs).logits[0, -len(target) - 1 : -1]
            total -= logits.log_softmax(-1).gather(1, target[:, None]).sum().item()
            count += len(target)
    assert expected_from == pytest.approx(total / count, rel=1e-5)


def test_answer_ends_with_an_end_mark(tiny):
    """A model that never saw an end would never stop."""
    for family, language in BACKBONES:
        model = LSTP.from_config(model_config(family, language))
        tokenizer = model.backbone.tokenizer
        assert tokenizer(model.answer_template.format(answer="red"))["input_ids"][-1] == tokenizer.eos_token_id


def test_left_padding_keeps_order():
    inputs = torch.arange(1.0, 6).view(1, 5, 1)
    moved, mask = _left_padded(inputs, torch.tensor([[1, 0, 0, 1, 1]]))
    assert mask.tolist() == [[0, 0, 1, 1, 1]]
    assert moved[0, 2:, 0].tolist() == [1, 4, 5]


def test_fusion_ignores_what_stands_in_padding():
    tokens = torch.randn(2, 3, 4, 8)
    tokens[0, 2], tokens[1] = float("nan"), float("nan")
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    prefix, prefix_mask = FrameFusion("mean")(tokens, mask, torch.nn.Identity())
    assert torch.allclose(prefix[0], tokens[0, :2].mean(0))
    assert torch.equal(prefix[1], torch.zeros(4, 8))
    assert prefix_mask.tolist() == [[1] * 4, [0] * 4]
    prefix, prefix_mask = FrameFusion("concat")(tokens, mask, torch.nn.Identity())
    assert torch.equal(prefix[0, :8], tokens[0, :2].reshape(8, 8))
    assert prefix_mask[0].tolist() == [1] * 8 + [0] * 4
    with pytest.raises(ConfigError, match="concat, mean"):
        FrameFusion("maen")


def test_instructblip_reads_the_question_and_blip2_does_not():
    frames = batch()["frames"][:, 0]
    for family, differs in (("instructblip", True), ("blip2", False)):
        backbone = LSTP.from_config(model_config(family)).eval().backbone
        with torch.no_grad():
            features = backbone.image_features(frames)
            one, other = (
                backbone.frame_tokens(features, ["which?"] * 3),
                backbone.frame_tokens(features, ["who is it?"] * 3),
            )
        assert bool((one != other).any()) is differs


def test_frozen_parts_stay_in_eval_mode_and_unchanged():
    model = LSTP.from_config(model_config(train=["sampler"], losses=["span"])).train()
    assert model.sampler.training and not model.backbone.model.qformer.training
    assert all(name.startswith("sampler.") == p.requires_grad for name, p in model.named_parameters())
    assert model.trained_parts().keys() == {"sampler"}
    assert all(key.startswith("sampler.") for key in model.trainable_state_dict())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(batch())["loss"].backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith("sampler.") for key in changed)


def test_pseudo_scores_are_those_of_each_frame_alone(tiny):
    samples = batch((4, 2))
    samples["video_id"] = ["same", "other"]
    samples["text_output"] = ["h , e", "turns 4 one"]
    scores = tiny.pseudo_scores(samples, rows=3)
    assert scores.shape == (2, 4) and scores[1, 2:].tolist() == [0, 0]
    uniform = LSTP.from_config(model_config(selector={"name": "uniform", "num_selected": 1})).eval()
    for i in range(2):
        for t in range(int(samples["frame_mask"][i].sum())):
            one = row(samples, i)
            one["frames"], one["frame_mask"] = one["frames"][:, t : t + 1], torch.ones(1, 1, dtype=torch.long)
            answer = uniform.answer(one)["prediction"][0]
            assert scores[i, t].item() == pytest.approx(token_recall(samples["text_output"][i], answer))


def test_labels_by_scores_are_those_of_the_frame_scorer_from_0_to_1():
    model = LSTP.from_config(model_config(selector={"name": "topk"}, scorer={"name": "answerer"})).eval()
    samples = {**batch(), "frame_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 8])}
    found, scores = model.label_scores(samples), model.chooser.frame_scores(samples)
    assert (found.amin(1).tolist(), found.amax(1).tolist()) == ([0.0] * 3, [1.0] * 3)
    assert found[1, 5:].tolist() == [0.0] * 3 and torch.equal(found[0].argsort(), scores[0].argsort())
    with pytest.raises(ConfigError, match="set model.scorer.name"):
        LSTP.from_config(model_config()).label_scores(samples)


def test_random_frames_depend_on_the_question_alone():
    model = LSTP.from_config(model_config(selector={"name": "random"})).eval()
    samples = batch((64, 64, 64))
    together = model.locate(samples)["frame_index"]
    assert torch.equal(together[2:], model.locate(row(samples, 2))["frame_index"])
    assert len({tuple(index.tolist()) for index in together}) == 3


def test_gold_spans_are_for_evaluation_only():
    model = LSTP.from_config(model_config(selector={"name": "given", "span_key": "gold_span"}))
    samples = {**batch(), "gold_span": torch.tensor([[2, 6]] * 3)}
    assert model.eval().locate(samples)["frame_index"].tolist() == [[2, 3, 4, 5]] * 3
    with pytest.raises(ConfigError, match="training never sees gold spans"):
        model.train()(samples)
    samples["gold_span"][1] = -1
    with pytest.raises(AnnotationError, match="row 1"):
        model.eval().locate(samples)


def test_one_gold_moment_is_learned_as_ever_and_of_several_the_likeliest():
    model = LSTP.from_config(model_config(losses=["span"], train=["sampler"])).eval()  # no dropout
    samples, none = {**batch((8, 8, 1)), "span": torch.tensor([[1, 3]] * 3)}, torch.full((3, 1, 2), -1)
    one, other = (samples | {"span": torch.tensor([span] * 3)} for span in ([1, 3], [5, 8]))
    losses = [model(row(alone, 0))["loss"].item() for alone in (one, other)]
    alone = torch.cat([samples["span"][:, None], none], dim=1)
    assert model(samples | {"any_span": alone})["loss"].item() == model(samples)["loss"].item()  # bit for bit
    both = torch.tensor([[[1, 3], [5, 8]]])
    assert model(row(samples, 0) | {"any_span": both})["loss"].item() == min(losses) < max(losses)


def test_missing_spans_cost_nothing_but_samples_must_say_so():
    model = LSTP.from_config(model_config(losses=["span"], train=["sampler"])).train()
    samples = {**batch(), "span": torch.full((3, 2), -1)}
    loss = model(samples)["loss"]
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    del samples["span"]
    with pytest.raises(ConfigError, match="datasets.<name>.spans"):
        model(samples)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train": ["sampler"], "losses": ["lm"]}, "'span' trains sampler of these; add"),
        ({"train": ["sampler", "query_tokens"], "losses": ["lm"]}, "'span' trains sampler of these; add"),
        ({"train": ["sampler"], "losses": ["lm", "span"]}, "'lm' trains nothing of these; remove"),
        ({"train": ["projection"], "losses": ["lm", "span"]}, "'span' trains nothing of these; remove"),
        ({"train": ["flow"]}, "unknown part"),
        ({"prompt": "{frage}"}, "model.prompt must contain {question}"),
        ({"sampler": {"mode": "both"}}, "unknown sampler mode 'both'"),
        ({"backbone": {"dtype": "float23"}}, "float32"),
        ({"backbone": {"family": "blip3"}}, "blip2"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(settings, named):
    with pytest.raises(ConfigError) as error:
        LSTP.from_config(model_config(**settings))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_input_and_output_embeddings_that_differ_load_as_they_are():
    """FLAN-T5's do; transformers 5 makes one tensor of them whenever it builds a T5, and the last one loaded wins."""
    model = LSTP.from_config(model_config("blip2", "t5"))
    language_model = model.backbone.language_model
    language_model.lm_head.weight = language_model.shared.weight
    key = "backbone.model.language_model.lm_head.weight"
    differing = {k: v + 1 if k == key else v for k, v in model.trainable_state_dict().items()}
    model.load_trained_state_dict(differing)
    assert all(torch.equal(value, differing[k]) for k, value in model.trainable_state_dict().items())


@pytest.mark.parametrize(("key", "value", "hint"), [
    ("losses", ["lmm"], "lm"),
    ("train", ["samplr"], "sampler"),
    ("fusion", "concatt", "concat"),
    ("flow", {"name": "raftt_large"}, "raft_large"),
    ("selector", {"name": "unifrom"}, "uniform"),
])  # fmt: skip
def test_unknown_names_are_answered_with_the_nearest(key, value, hint):
    with pytest.raises(ConfigError, match=f"unknown .*did you mean '{hint}'"):
        LSTP.from_config(model_config(**{key: value}))


def test_checkpoints_load_whole_parts_or_not_at_all(tmp_path, tiny):
    trained = {k: v.clone() + 1 for k, v in tiny.trainable_state_dict().items()}
    file = tmp_path / "model.safetensors"
    save_file(trained, file)
    model = LSTP.from_config(model_config(checkpoint=str(file)))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in trained.items())

    first = next(key for key in trained if "vision_model" in key)
    others = [key for key in trained if key != first]
    for broken, message in (
        ({k: trained[k] for k in others}, "1 of .* keys missing"),
        ({**trained, "backbone.model.extra": torch.zeros(1)}, "does not have"),
        ({**trained, first: torch.zeros(3)}, r"\[3\] in the file"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(WeightsError, match=message):
            model.load_trained_state_dict(broken)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(WeightsError, match="nowhere"):
        model.load_checkpoint(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("family", "language"), BACKBONES)
def test_hub_shaped_folder_gives_the_same_answers(tmp_path, family, language):
    """The path that 7B weights take: config, safetensors and tokenizer files through `from_pretrained`."""
    model = LSTP.from_config(model_config(family, language)).eval()
    model.backbone.model.save_pretrained(tmp_path)
    model.backbone.tokenizer.save_pretrained(tmp_path)
    if model.backbone.qformer_tokenizer is not None:
        model.backbone.qformer_tokenizer.save_pretrained(tmp_path / "qformer_tokenizer")
    loaded = LSTP.from_config(model_config(family, language, backbone={"weights": str(tmp_path)})).eval()
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[key], value), key
    samples = batch()
    assert loaded.answer(samples)["prediction"] == model.answer(samples)["prediction"]
    with torch.no_grad():
        assert loaded(samples)["loss"].item() == pytest.approx(model(samples)["loss"].item(), rel=1e-6)


def test_missing_backbone_weights_say_where(tmp_path):
    with pytest.raises(WeightsError, match="model.backbone.weights"):
        Backbone.from_pretrained(str(tmp_path / "instructblip-vicuna-7b"), family="instructblip")


def test_frames_of_the_wrong_size_say_which_key(tiny):
    samples = batch()
    samples["frames"] = samples["frames"][..., :32, :32]
    with pytest.raises(ConfigError, match="image_size: 64"):
        tiny.answer(samples)


def test_labels_are_ignored_outside_the_answer():
    assert IGNORED == torch.nn.CrossEntropyLoss().ignore_index


def test_lavis_names(tiny):
    model = load_model("lstp_tiny", is_eval=True)
    samples = batch()
    expected = tiny.answer(samples)["prediction"]
    assert model.generate(samples) == expected
    assert model.predict_answers(samples, num_beams=1, inference_method="generate") == expected
    assert model.generate(samples, max_length=1) == tiny.answer(samples, max_new_tokens=1)["prediction"] != expected
    asked = model.answer(samples, prompt="Question: {} Answer:")["prompt"]
    assert asked[0] == f"Question: {QUESTIONS[0]} Answer:"
    assert model.predict_answers(samples, prompt="") == expected  # what LAVIS's task vqa passes
    with pytest.raises(ConfigError, match="rank"):
        model.predict_answers(samples, inference_method="rank")


def test_keys_of_a_batch(tiny):
    """LAVIS's BLIP-2 keys are named in one line; one text stands for all rows, as in LAVIS."""
    samples = batch((8, 8))
    wanted = tiny.generate({**samples, "text_input": ["what?", "what?"]}, num_captions=1)
    assert tiny.generate({**samples, "text_input": "what?"}) == wanted
    learnt = tiny({**samples, "text_input": "what?", "text_output": "red"})["loss"]
    assert learnt == tiny({**samples, "text_input": ["what?"] * 2, "text_output": ["red"] * 2})["loss"]
    for call in (tiny.generate, tiny.answer, tiny.locate, tiny.score_options, tiny.pseudo_scores, tiny.forward):
        with pytest.raises(ConfigError) as caught:
            call({"image": torch.zeros(1, 3, 64, 64), "prompt": "what is this?"})
        assert str(caught.value).startswith(
            "samples have no frames, frame_mask, text_input, but image, prompt; image and prompt are keys of LAVIS's "
        )
        with pytest.raises(ConfigError, match="samples have 3 texts in text_input for 2 rows"):
            call({**samples, "text_input": ["a", "b", "c"]})
    with pytest.raises(ConfigError, match="num_return_sequences=2"):
        tiny.generate(samples, num_captions=2)


def test_a_frozen_language_model_drops_out_in_training_alone_and_where_asked():
    """T5 has a dropout of 0.1; published training had it in frozen parts, too."""
    for asked in (False, True):
        model = LSTP.from_config(model_config("blip2", "t5", train=["projection"], frozen_dropout=asked)).train()
        language_model = model.backbone.language_model
        assert language_model.training is asked and language_model.encoder.block[0].training is asked
        frozen = (model.backbone.vision_model, model.backbone.qformer, model.sampler, model.flow)
        assert not any(part.training for part in frozen)
        losses = {model(batch())["loss"].item() for _ in range(3)}
        assert (len(losses) > 1) is asked
        assert not any(parameter.requires_grad for parameter in language_model.parameters())
        assert not model.eval().backbone.language_model.training
        assert len({model(batch())["loss"].item() for _ in range(2)}) == 1


def test_a_generation_setting_that_depends_on_the_batch_is_refused_before_a_run():
    with pytest.raises(ConfigError, match="num_return_sequences=2 is not supported"):
        LSTP.from_config(model_config(generation={"num_return_sequences": 2}))


def test_training_a_span_loss_needs_a_data_set_with_spans():
    from types import SimpleNamespace

    from lavis_lstp.tasks.temporal_grounding import TemporalGroundingTask

    model = LSTP.from_config(model_config(losses=["span"], train=["sampler"]))
    without, some = SimpleNamespace(spans=None), SimpleNamespace(spans={})
    task = TemporalGroundingTask()
    task.before_training(model=model, dataset=SimpleNamespace(datasets=[without, some]))
    with pytest.raises(ConfigError, match="no training data set has spans"):
        task.before_training(model=model, dataset=SimpleNamespace(datasets=[without, without]))


def test_raft_in_a_checkpoint_is_left_out_where_the_flow_is_given(tiny, tmp_path, caplog):
    state = {key: value + 1 for key, value in tiny.state_dict().items() if "language_projection" in key}
    save_file({**state, "flow.model.fnet.weight": torch.zeros(2)}, tmp_path / "whole.safetensors")
    model = LSTP.from_config(model_config(flow={"name": "precomputed"}))
    with caplog.at_level("INFO"):
        assert model.load_checkpoint(str(tmp_path / "whole.safetensors")) == ["projection"]
    assert "left out 1 weights of RAFT, the model's flow is 'precomputed'" in caplog.text
    with_raft = LSTP.from_config(model_config(flow={"name": "raft_small", "weights": "checkpoint"}))
    with pytest.raises(WeightsError, match="flow.model"):
        with_raft.load_checkpoint(str(tmp_path / "whole.safetensors"))


def test_a_missing_checkpoint_is_said_before_anything_is_built(monkeypatch, tmp_path):
    monkeypatch.setattr("lavis_lstp.models.building.build_backbone", lambda **cfg: pytest.fail("built"))
    with pytest.raises(WeightsError, match="no weights at"):
        LSTP.from_config({**model_config(), "checkpoint": [str(tmp_path / "gone.ckpt")]})


def test_the_sampler_reads_the_beginning_of_a_long_text(tiny):
    """InstructBLIP's Q-Former tokenizer cuts at the left; the sampler's, made of it, as BERT's own does."""
    backbone = copy.copy(tiny.backbone)
    backbone.qformer_tokenizer = copy.deepcopy(tiny.backbone.qformer_tokenizer)
    backbone.qformer_tokenizer.truncation_side = "left"
    tokenizer = sampler_tokenizer(None, backbone)
    assert tokenizer.truncation_side == "right" and backbone.qformer_tokenizer.truncation_side == "left"
    assert tokenizer("red star", truncation=True, max_length=1)["input_ids"] == tokenizer("red")["input_ids"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"train": "qformer"}, "model.train must be a list, got 'qformer'"),
        ({"train": ["qformer", "qformer"]}, "model.train names something twice"),
        ({"sampler": {"max_text_tokens": 0}}, "model.sampler.max_text_tokens must be a whole number of at least 1"),
        ({"backbone": {"max_text_tokens": -1}}, "model.backbone.max_text_tokens must be a whole number"),
        (
            {"losses": ["lm", "span"], "train": ["sampler", "qformer"], "refinement": {"in_loop": True, "smooth": 0}},
            "smooth",
        ),
    ],
)
def test_settings_out_of_range(overrides, said):
    with pytest.raises(ConfigError, match=said):
        LSTP.from_config(model_config(**overrides))


def windowed(window: int, overlap: int | None = None, **settings) -> LSTP:
    """`tiny` with windows: its weights come from the same seed."""
    return LSTP.from_config(model_config(sampler={"window": window, "overlap": overlap}, **settings)).eval()


def test_windows_change_nothing_for_videos_that_fit(tiny):
    samples = batch((8, 8, 5))
    found, expected = windowed(8).locate(samples), tiny.locate(samples)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_windows_are_scored_one_by_one_and_joined():
    samples, model = batch((20, 7, 13)), windowed(8, 2)
    flow = model.chooser.flow(samples)
    found = model.chooser.logits(samples)
    plain = model.chooser.scorer._score
    alone = torch.zeros(2, 20)
    weight = torch.tensor([1.0, 2, 3, 4, 4, 3, 2, 1])
    total = torch.zeros(20)
    for start in (0, 6, 12):
        own = slice(start, start + 8)
        with torch.no_grad():
            scores = plain(flow[:1, own], torch.ones(1, 8), QUESTIONS[:1])
        alone[:, own] += weight * torch.stack(scores[1:])[:, 0]
        total[own] += weight
    joined = torch.stack(found[1:])
    assert torch.allclose(joined[:, 0], alone / total, atol=1e-5)
    for i in range(3):  # as without the others
        own = torch.stack(model.chooser.logits(row(samples, i))[1:])[:, 0]
        assert torch.allclose(joined[:, i, : own.shape[1]], own, atol=1e-5)
    assert joined[:, 1, 8:].abs().max() == 0, "no window is of padding alone"


def test_every_rank_counts_windows_where_weights_are_divided(tiny, monkeypatch):
    """A batch that fits goes the same way as one that does not: the ranks ask each other how often they will run."""
    asked = []
    real = chooser.in_pieces
    monkeypatch.setattr(chooser, "in_pieces", lambda items, *how: asked.append(list(items)) or real(items, *how))
    monkeypatch.setattr(chooser, "weights_are_divided", lambda model: True)
    samples = batch((5, 2, 3))
    found = windowed(8, 6).chooser.logits(samples)
    assert asked == [[(0, 0), (1, 0), (2, 0)]]
    for ours, whole in zip(found[1:], tiny.chooser.logits(samples)[1:], strict=True):
        assert torch.allclose(ours[0], whole[0], atol=1e-5)


def test_a_sampler_learns_in_windows():
    model = windowed(4, 1, train=["sampler"], losses=["span"]).train()
    model(batch((11, 3, 8)))["loss"].backward()
    assert all(p.grad is not None for p in model.sampler.parameters() if p.requires_grad)


def test_windows_reach_beyond_the_positions_of_the_sampler():
    settings = {"sampler": {"max_positions": 12}}
    with pytest.raises(ConfigError, match=r"set model.sampler.window"):
        LSTP.from_config(model_config(**settings)).locate(batch((20,)))
    model = LSTP.from_config(model_config(sampler={"max_positions": 12, "window": 10}, selector={"max_spans": 3}))
    found = model.eval().locate(batch((20,)))
    assert found["start_logits"].shape == (1, 20) and 1 <= len(found["spans"][0]) <= 3


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ({"window": 8, "overlap": 8}, "window is 8; expected more than the overlap (8)"),
        ({"window": 4096}, "window is 4096"),
        ({"overlap": 2}, "set model.sampler.window"),
        ({"window": 8, "_padding": False}, "does not go with mask_padding"),
    ],
)
def test_windows_that_cannot_be_are_one_line(sampler, said):
    padding = sampler.pop("_padding", True)
    with pytest.raises(ConfigError) as caught:
        LSTP.from_config(model_config(sampler=sampler, mask_padding=padding))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("fusion", ["concat", "mean"])
@pytest.mark.parametrize("language", ["llama", "t5"])
def test_answers_with_an_adaptive_number_of_frames_do_not_depend_on_the_batch(language, fusion):
    chosen = {"name": "topk", "num_selected": "auto", "most_selected": 6, "mass": 0.55}
    model = LSTP.from_config(model_config(language=language, fusion=fusion, selector=chosen)).eval()
    samples = batch((8, 5, 3))
    together = model.answer(samples)
    assert len(set(together["num_shown"].tolist())) > 1
    for i in range(3):
        alone = model.answer(row(samples, i))
        assert alone["prediction"] == together["prediction"][i : i + 1]
        assert alone["frame_index"].tolist()[0] == [j for j in together["frame_index"][i].tolist() if j >= 0]
        assert alone["log_prob"][0]["sum"] == pytest.approx(together["log_prob"][i]["sum"], abs=2e-4)
    model.train()(samples)["loss"].backward()
