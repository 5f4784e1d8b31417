"""Every cell of the table of LAVIS's models, found with tiny random weights of lavis_tiny."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lavis_tiny
import pytest
import torch
import torch.distributed as dist
import transformers
from lavis_tiny import BERT_VOCAB, HEADS, IMAGE_SIZE, WIDTH
from omegaconf import OmegaConf

from lavis_lstp.commands import cli
from lavis_lstp.host.lavis_table import ROWS

TEXT = ["a picture of a red circle", "a picture of the blue square moves left"]
FUSED = {"num_hidden_layers": 8, "fusion_layer": 6}
VIDEO = {"timesformer": {"n_frms": 2, "image_size": 32, "patch_size": 16, "drop_path_rate": 0.1}}
OF_VIDEO = {**FUSED, "add_type_embeddings": True, "add_cross_attention": False}
CONFIGS: dict[str, tuple[dict, dict]] = {
    "albef_classification": ({"num_classes": 3}, FUSED),
    "albef_feature_extractor": ({}, FUSED),
    "albef_nlvr": ({"num_classes": 2}, FUSED),
    "albef_pretrain": ({"queue_size": 8}, FUSED),
    "albef_retrieval": ({"queue_size": 8}, FUSED),
    "albef_vqa": ({}, FUSED),
    "alpro_qa": ({"num_classes": 3, "hidden_size": WIDTH, **VIDEO}, OF_VIDEO),
    "alpro_retrieval": (VIDEO, {**OF_VIDEO, "hidden_size": 768, "encoder_width": 768}),
    "blip_caption": ({"prompt": "a picture of "}, {}),
    "blip_classification": ({"num_classes": 3}, {}),
    "blip_nlvr": ({"num_classes": 2}, {}),
    "blip_pretrain": ({"queue_size": 8}, {"vocab_size": len(BERT_VOCAB)}),
    "blip_retrieval": ({"queue_size": 8}, {}),
}
"""Model -> what its config has beside the sizes, and its BERT's beside the tiny one."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Tiny weights as working directory, and towers of two layers in place of those whose sizes are in the code."""
    from lavis.models import vit
    from lavis.models.base_model import BaseModel
    from lavis.models.clip_models import model as clip
    from lavis.models.timesformer import vit as timesformer

    def tower(cls, cfg, from_pretrained=False):
        made = cls(IMAGE_SIZE, 14, embed_dim=WIDTH, depth=2, num_heads=HEADS, norm_layer=None)
        made.vision_width = WIDTH
        return made

    def of_video(**sizes):  # alpro_retrieval's width is in its code
        wide = 768 if of_video.wide else WIDTH
        return whole(**{**sizes, "embed_dim": wide, "depth": 1, "num_heads": HEADS})

    whole, of_video.wide = timesformer.VisionTransformer, False
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with lavis_tiny.hub(tmp_path_factory.mktemp("hub")) as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit.VisionTransformerEncoder, "from_config", classmethod(tower))
        patch.setattr(timesformer, "VisionTransformer", of_video)
        patch.setattr(BaseModel, "load_checkpoint_from_config", lambda self, cfg, **sizes: None)
        text = {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": HEADS, "layers": 2}
        sizes = {"vision_cfg": {"image_size": IMAGE_SIZE, "layers": 2, "width": 64, "patch_size": 14}, "text_cfg": text}
        patch.setitem(clip._MODEL_CONFIGS, "tiny", {"embed_dim": 16, **sizes})
        small = transformers.GPT2Config(n_embd=WIDTH, n_layer=1, n_head=HEADS, vocab_size=50, n_positions=32)
        transformers.GPT2LMHeadModel(small).save_pretrained(root / "gpt2")
        yield SimpleNamespace(root=root, of_video=of_video)
    dist.destroy_process_group()


def built(name: str, hub: Any) -> torch.nn.Module:
    from lavis.common.registry import registry

    if name.startswith("blip2"):
        section = lavis_tiny.config(name if name in ("blip2_t5", "blip2_opt") else "blip2", hub.root)
        return registry.get_model_class(name).from_config(OmegaConf.create({**section, "arch": name})).float()
    own, of_bert = CONFIGS.get(name, ({}, {}))
    sizes = {"vocab_size": len(BERT_VOCAB) + (0 if name.startswith("al") else 2), "encoder_width": WIDTH, **of_bert}
    sizes = {"add_cross_attention": True, "add_type_embeddings": False, **sizes}
    hub.of_video.wide = name == "alpro_retrieval"
    med = hub.root / f"{name}.json"
    med.write_text(json.dumps({**lavis_tiny.bert_config(1), **sizes}))
    section = {
        **{"arch": name, "image_size": IMAGE_SIZE, "med_config_path": str(med), "load_finetuned": False},
        **{"clip": {"model_type": "tiny", "pretrained": ""}}.get(name.removesuffix("_feature_extractor"), {}),
        **own,
    }
    if name == "gpt_dialogue":
        section["len_tokenizer"] = 50
    if name == "pnp_unifiedqav2_fid":
        folder = hub.root / "tiny-flan-t5"
        section |= {"pretrained": str(folder), "t5_config_path": str(folder / "config.json")}
    if name == "pnp_vqa":
        return built("pnp_unifiedqav2_fid", hub)  # the first of its parts that is special
    if name == "img2prompt_vqa":
        import spacy

        if spacy.util.is_package("en_core_web_sm"):
            pytest.skip("this machine has spaCy's model")
        return registry.get_model_class(name)(*[torch.nn.Identity()] * 4)
    return registry.get_model_class(name).from_config(OmegaConf.create(section)).float()


def samples(name: str) -> dict[str, Any]:
    image = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    answers = {"answer": ["red", "blue"], "weight": torch.ones(2), "n_answers": torch.tensor([1, 1])}
    found = {"image": image, "text_input": list(TEXT), "text_output": ["red", "blue"], **answers}
    found |= {"image0": image, "image1": image.flip(0), "label": torch.tensor([0, 1]), "image_id": torch.tensor([0, 1])}
    found |= {"epoch": 0, "iters": 0, "num_iters_per_epoch": 1, "answers": torch.tensor([0, 2])}
    if name.startswith("alpro"):
        found["video"] = torch.randn(2, 3, 2, 32, 32)
    if name == "blip2_image_text_matching":
        found["text_input"] = [TEXT[0]] * 2
    return found


class Pairs(list):
    """A data loader of retrieval."""

    dataset = SimpleNamespace(text=TEXT, image=["a", "b"])


def loss_of(model: torch.nn.Module, name: str) -> None:
    made = model.train()(samples(name))
    loss = made["loss"] if isinstance(made, dict) else made.loss
    assert loss.isfinite()
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def used(model: torch.nn.Module, name: str, method: str) -> None:
    more: dict[str, Any] = {}
    if method == "compute_sim_matrix":
        with torch.no_grad():
            found = model.eval().compute_sim_matrix(Pairs([samples(name)]), task_cfg=SimpleNamespace(k_test=2))
        assert [one.shape for one in found] == [(2, 2), (2, 2)]
        return
    if name == "albef_vqa":
        more = {"answer_list": ["red", "blue", "yes"], "num_ans_candidates": 2}
    elif name == "blip_vqa":
        more = {"inference_method": "generate", "num_beams": 1, "max_len": 4, "min_len": 1}
    elif method == "generate":
        more = {"num_beams": 1, "max_length": 12, "min_length": 1}
    with torch.no_grad():
        assert getattr(model.eval(), method)(samples(name), **more) is not None


def runs(work: Callable[[], Any]) -> bool:
    try:
        work()
    except Exception as error:  # the table says that it does not work, and this is why
        logging.getLogger(__name__).info("%s: %s", type(error).__name__, error)
        return False
    return True


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_says_what_the_model_does(hub, row):
    if row.name.startswith("pnp") and transformers.__version__.startswith("4."):
        pytest.skip("its tokenizer there reads a sentencepiece file, which the tiny T5 lacks")
    torch.manual_seed(0)
    model = None
    try:
        model = built(row.name, hub)
    except Exception:
        if row.build:
            raise
    assert (model is not None) == row.build
    if model is None:
        assert row.note and not row.works
        return
    stages = [
        (row.forward, lambda: model.eval()(samples(row.name))),
        (row.works, lambda: used(model, row.name, row.method)),
        (row.train, lambda: loss_of(model, row.name)),
    ]
    for told, work in stages:
        if told:
            work()  # its own error is the best message
        elif told is False:
            assert not runs(work), f"{row.name} works now: say so in the table"
    assert row.note or not {False} & {row.forward, row.works, row.train}


def test_the_table_has_all_models_of_lavis_and_doctor_prints_it(capsys):
    from lavis.common.registry import registry

    assert [row.name for row in ROWS] == [n for n in registry.list_models() if not n.startswith(("lstp", "toy"))]
    assert cli.main(["doctor", "--lavis"]) == 0
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in ROWS) and "under transformers" in printed
    assert cli.main(["doctor", "--lavis", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(ROWS)
