"""The tiny checkpoints: what they share with the published ones, and that the code for those reads them.

Runs on transformers 5.x and on 4.57.6 (`make test-matrix`).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from conftest import GOLDEN
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from lavis_lstp.errors import ConfigError
from lavis_lstp.models import variants
from lavis_lstp.models.answer.qformer import Backbone
from lavis_lstp.models.where.flow import build_flow
from lavis_lstp.testing import tiny_checkpoints
from lavis_lstp.testing.published_layout import bert_shapes, lavis_shapes, raft_shapes, sampler_shapes
from lavis_lstp.testing.tiny_backbones import BACKBONES, backbone_config
from lavis_lstp.testing.tiny_checkpoints import DEFAULT, WRITERS, lstp_state_dict, main, size_options, write_all
from lavis_lstp.testing.tiny_tokenizers import bert_files, bert_vocabulary, llama_files, t5_files
from lavis_lstp.testing.tiny_video_llms import VIDEO_LLMS, can_be_written

INVENTORY = json.loads((GOLDEN / "key_inventory.json").read_text())
LAYOUTS = {
    "instructblip-vicuna-7b": "LSTP (InstructBLIP-Vicuna-7B)",
    "instructblip-flan-t5-xl": "LSTP (InstructBLIP-FLAN-T5-XL)",
    "blip2-flan-t5-xl": "LSTP_blip2 (BLIP-2 FLAN-T5-XL)",
}
WRITABLE = [name for name in WRITERS if name not in VIDEO_LLMS or can_be_written()]
SMALL = [name for name in WRITABLE if not name.startswith(("lstp-7b", "raft"))]
TEXTS = (
    "USER: <video>\nwhat does the red circle do? ASSISTANT: ",
    "Is it a zebra?\n12  apples, \ttoo",
    "ﬁne Ünïcode… 4 > 2 {x}",
    "",
)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tiny") / "weights"


@pytest.fixture(scope="module")
def written(out) -> dict[str, Path]:
    return write_all(out)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def load(path: Path):
    return torch.load(path, weights_only=True)


# ---- tokenizers -----------------------------------------------------------------------------------------------


def test_llama_tokenizer(written):
    tokenizer = transformers.AutoTokenizer.from_pretrained(written["instructblip-vicuna-7b"])
    assert type(tokenizer).__name__ in ("LlamaTokenizer", "LlamaTokenizerFast")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=llama_files()["tokenizer.model"])
    size = pieces.get_piece_size()
    assert [pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()] == [0, 1, 2, -1]
    assert (len(tokenizer), tokenizer.pad_token, tokenizer.pad_token_id) == (size + 1, "[PAD]", size)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (2, 2, 2)
    assert tokenizer.truncation_side == "left"
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == [2, *pieces.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("left.</s>")["input_ids"] == [2, *pieces.encode("left."), 2]
    config = json.loads((written["instructblip-vicuna-7b"] / "config.json").read_text())["text_config"]
    assert config["vocab_size"] == len(tokenizer)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, -1)


@pytest.mark.parametrize(("name", "side"), [("instructblip-flan-t5-xl", "left"), ("blip2-flan-t5-xl", "right")])
def test_t5_tokenizer(written, name, side):
    tokenizer = transformers.AutoTokenizer.from_pretrained(written[name])
    assert type(tokenizer).__name__ in ("T5Tokenizer", "T5TokenizerFast")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=t5_files()["spiece.model"])
    size = pieces.get_piece_size()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.convert_tokens_to_ids(["<extra_id_99>", "<extra_id_0>"]) == [size, size + 99]
    assert (len(tokenizer), tokenizer.truncation_side) == (size + 100, side)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [*pieces.encode(text), 1]
    assert tokenizer("<video>\nwhat")["input_ids"].count(2) == 1, "the published tokenizer does not know <"
    config = json.loads((written[name] / "config.json").read_text())["text_config"]
    assert config["vocab_size"] > len(tokenizer)
    assert (config["pad_token_id"], config["eos_token_id"], config["decoder_start_token_id"]) == (0, 1, 0)


@pytest.mark.parametrize("name", ["instructblip-vicuna-7b", "instructblip-flan-t5-xl"])
def test_the_sentencepiece_model_alone_is_enough(written, tmp_path, name):
    """Some folders of the hub have no tokenizer.json; transformers converts the model then, which needs protobuf."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(written[name], tmp_path / name)
    (folder / "tokenizer.json").unlink()
    texts = ["USER: <video>\nwhat is it? ASSISTANT: ", "the red star", ""]
    alone, whole = (AutoTokenizer.from_pretrained(str(place))(texts)["input_ids"] for place in (folder, written[name]))
    assert alone == whole


def test_bert_tokenizers(written):
    bert = transformers.AutoTokenizer.from_pretrained(written["bert-base-uncased"])
    folder = written["instructblip-vicuna-7b"]
    qformer = transformers.AutoTokenizer.from_pretrained(folder, subfolder="qformer_tokenizer")
    for tokenizer in (bert, qformer):
        assert type(tokenizer).__name__ in ("BertTokenizer", "BertTokenizerFast")
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        assert tokenizer.convert_tokens_to_ids(special) == [0, 100, 101, 102, 103]
    assert (len(qformer), qformer.bos_token, qformer.bos_token_id) == (len(bert) + 1, "[DEC]", len(bert))
    assert bert.bos_token is None and bert.decode(bert("A Zebra?")["input_ids"]) == "[CLS] a zebra? [SEP]"
    assert all(bert(text)["input_ids"] == qformer(text)["input_ids"] for text in TEXTS)
    config = json.loads((folder / "config.json").read_text())
    assert config["qformer_config"]["vocab_size"] == len(qformer)
    assert not (written["blip2-flan-t5-xl"] / "qformer_tokenizer").exists()


def test_words_of_the_data_are_whole_tokens():
    assert {"red", "circle", "what", "left"} <= set(bert_vocabulary())
    assert set(bert_files()["vocab.txt"].decode().split()) == set(bert_vocabulary())


# ---- backbones ------------------------------------------------------------------------------------------------


def test_files_of_the_hub(written):
    shards = {name: len(list(written[name].glob("model*.safetensors"))) for name in BACKBONES}
    assert shards == {"instructblip-vicuna-7b": 3, "instructblip-flan-t5-xl": 2, "blip2-flan-t5-xl": 1}
    for name, count in shards.items():
        assert (written[name] / "model.safetensors.index.json").is_file() == (count > 1)
        config = json.loads((written[name] / "config.json").read_text())
        assert config["image_token_index"] is None and not config["tie_word_embeddings"]
        assert transformers.AutoImageProcessor.from_pretrained(written[name]).size["height"] == 28


@pytest.mark.parametrize("name", BACKBONES)
def test_plain_transformers_loads_a_backbone(written, name):
    kind = {"instructblip": "InstructBlip", "blip2": "Blip2"}[BACKBONES[name].family]
    model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
    model, found = model_class.from_pretrained(written[name], output_loading_info=True)
    assert not any(found.values()), found
    own, stored = model.state_dict(), tensors(written[name])
    assert all(torch.equal(own[key], value) for key, value in stored.items())
    tied = {f"language_model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
    assert own.keys() - stored.keys() == (tied if "t5" in name else set())
    if "t5" in name:
        assert not torch.equal(own["language_model.lm_head.weight"], own["language_model.shared.weight"])
    assert len({value.shape[-1] for value in (own["query_tokens"], own["language_projection.bias"])}) == 2


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_learns_and_answers(written, name):
    backbone = Backbone.from_pretrained(str(written[name]), family=BACKBONES[name].family).eval()
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, generator=generator)
    prompts = [TEXTS[0], "USER: how many blue squares are there? ASSISTANT: "]
    prefix = backbone.project(backbone.frame_tokens(backbone.image_features(frames), prompts))
    mask = torch.ones(prefix.shape[:2], dtype=torch.long)
    assert prefix.shape == (2, DEFAULT.queries, DEFAULT.text_width)
    losses = [backbone.lm_loss(prefix, mask, prompts, [answer] * 2).item() for answer in ("left</s>", "two</s>")]
    assert all(2 < loss < 12 for loss in losses) and losses[0] != losses[1]
    answers = backbone.generate(prefix, mask, prompts, max_new_tokens=8, do_sample=False).texts
    assert all(answers) and answers[0] != answers[1]
    assert not torch.allclose(prefix[0], prefix[1], atol=1e-3)


def test_dtype(tmp_path):
    folder = write_all(tmp_path / "o", only=["blip2-flan-t5-xl"], dtype="bfloat16")["blip2-flan-t5-xl"]
    assert {value.dtype for value in tensors(folder).values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


# ---- the published layouts ------------------------------------------------------------------------------------


def within_the_tiny_depth(key: str) -> bool:
    numbers = [int(n) for n in re.findall(r"(?:layers|block|qformer\.encoder\.layer)\.(\d+)\.", key)]
    return all(number < DEFAULT.layers for number in numbers)


@pytest.mark.parametrize("name", LAYOUTS)
def test_names_of_a_whole_checkpoint_are_the_inventorys(name):
    published = {**INVENTORY["shared"], **INVENTORY["layouts"][LAYOUTS[name]]}
    wanted = {key: len(shape) for key, shape in published.items() if within_the_tiny_depth(key)}
    state_dict = lstp_state_dict(backbone=name)
    assert {key: value.ndim for key, value in state_dict.items()} == wanted
    integers = {key for key, value in state_dict.items() if value.dtype == torch.int64}
    assert integers == {key for key in wanted if key.endswith(("position_ids", "num_batches_tracked"))}
    assert len(integers) == 1 + 17 and all(value.isfinite().all() for value in state_dict.values())


def test_the_layouts_at_full_size_are_the_golden_ones():
    sampler = sampler_shapes(
        width=768, layers=12, heads=12, inner=3072, vocab_size=30522, positions=512, fusion_layer=6, flow_size=224
    )
    shapes = {f"temporal_encoder.{key}": shape for key, shape in sampler.items()}
    shapes |= {f"of_extractor.{key}": shape for key, shape in raft_shapes().items()}
    assert shapes == INVENTORY["shared"]
    bert = bert_shapes(width=768, layers=12, inner=3072, vocab_size=30522, positions=512)
    assert sum(torch.Size(shape).numel() for shape in bert.values()) == 110_106_428  # of google-bert/bert-base-uncased


def test_lstp_keeps_what_is_frozen_and_differs_in_what_is_trained(written):
    base, lstp = tensors(written["instructblip-vicuna-7b"]), load(written["lstp-7b"])
    same = {key for key, value in base.items() if torch.equal(value, lstp[f"model.{key}"])}
    changed = base.keys() - same
    assert changed and all(key.startswith(("qformer.", "query_tokens", "language_projection.")) for key in changed)
    assert {"query_tokens", "language_projection.weight"} <= changed
    assert all(key.startswith(("vision_model.", "language_model.")) for key in same)


def test_forms_of_a_whole_checkpoint(written):
    bare, lightning, lora = (load(written[name]) for name in ("lstp-7b", "lstp-7b-lightning", "lstp-7b-lora"))
    wrapped = lightning["state_dict"]
    assert lightning["global_step"] and wrapped.keys() == {f"module.{key}" for key in bare}
    assert all(torch.equal(wrapped[f"module.{key}"], value) for key, value in bare.items())
    renamed = {key.replace("language_model.base_model.model.", "language_model."): key for key in lora}
    assert bare.keys() < renamed.keys()
    assert all(torch.equal(bare[key], lora[renamed[key]]) for key in bare)
    adapters = {key for key in lora if ".lora_" in key}
    assert len(adapters) == 2 * 2 * DEFAULT.layers and all(lora[key].abs().sum() > 0 for key in adapters)


@pytest.mark.parametrize("name", ["instructblip-vicuna-7b", "blip2-flan-t5-xl"])
def test_adapters_are_named_as_peft_names_them(name):
    """Today's peft keeps a layer's own weight under `base_layer`; that of the published code did not."""
    from peft import LoraConfig, get_peft_model

    text = backbone_config(name, DEFAULT)["text_config"]
    kind, model_class = (
        (transformers.LlamaConfig, transformers.LlamaForCausalLM)
        if text["model_type"] == "llama"
        else (transformers.T5Config, transformers.T5ForConditionalGeneration)
    )
    with torch.device("meta"):
        settings = {key: value for key, value in text.items() if key not in ("architectures", "pad_token_id")}
        model = get_peft_model(model_class(kind(**settings)), LoraConfig(r=8, lora_alpha=32))
    wanted = {key.replace(".base_layer.", "."): value.shape for key, value in model.state_dict().items()}
    before = "model.language_model."
    state_dict = lstp_state_dict(backbone=name, lora=True)
    got = {key.removeprefix(before): value.shape for key, value in state_dict.items() if key.startswith(before)}
    assert got == wanted


def test_bert_is_transformers(written):
    model, found = transformers.BertModel.from_pretrained(written["bert-base-uncased"], output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"]
    stored = tensors(written["bert-base-uncased"])
    assert torch.equal(model.embeddings.LayerNorm.weight, stored["bert.embeddings.LayerNorm.gamma"])
    whole, found = transformers.BertForPreTraining.from_pretrained(
        written["bert-base-uncased"], output_loading_info=True
    )
    assert not any(found.values()), found
    assert whole.cls.predictions.decoder.weight is whole.bert.embeddings.word_embeddings.weight


def test_raft_is_the_golden_one_and_gives_flow(written):
    golden = json.loads((GOLDEN / "raft.json").read_text())["shapes"]
    stored = load(written["raft-sintel"])
    assert {key: list(value.shape) for key, value in stored.items()} == {f"module.{k}": v for k, v in golden.items()}
    assert torch.equal(stored["module.cnet.layer2.0.norm3.weight"], stored["module.cnet.layer2.0.downsample.1.weight"])
    flow = build_flow("raft_large", weights=written["raft-sintel"], iterations=2)
    frames = torch.randint(0, 256, (1, 3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    field = flow(frames)
    assert field.isfinite().all() and 0 < field.abs().max() < 1000
    assert not torch.equal(field[0, 0], field[0, 1])


def test_lavis_names_are_those_of_lavis(written, tmp_path, monkeypatch):
    import lavis_tiny

    sizes = {"vision_width": 32, "vision_layers": 2, "vision_inner": 64, "patch_size": 14, "patches": 4}
    sizes |= {"width": 32, "layers": 2, "inner": 64, "positions": 64, "queries": 4, "text_width": 32}

    def shapes(module: nn.Module, but: str) -> dict[str, list[int]]:
        state_dict = module.state_dict()
        return {key: list(value.shape) for key, value in state_dict.items() if not re.match(but, key)}

    with lavis_tiny.hub(tmp_path):
        model = lavis_tiny.build("blip2_t5", tmp_path)
        # InstructBLIP's Q-Former keeps the text, as that of this model does
        instruct = lavis_tiny.build("blip2", tmp_path)
    assert lavis_shapes(**sizes, projection="t5_proj") == shapes(model, "t5_model")
    vocab_size = instruct.Qformer.bert.embeddings.word_embeddings.num_embeddings
    got = lavis_shapes(**sizes, projection="llm_proj", vocab_size=vocab_size)
    heads = r"(vision_proj|text_proj|itm_head|Qformer\.cls|temp)"
    assert {key: shape for key, shape in got.items() if "llm_proj" not in key} == shapes(instruct, heads)
    for name, projection in (("lavis-blip2-t5", "t5_proj"), ("lavis-instructblip-vicuna", "llm_proj")):
        stored = load(written[name])["model"]
        assert stored[f"{projection}.weight"].shape == (DEFAULT.text_width, DEFAULT.qformer_width)
        assert ("Qformer.bert.embeddings.word_embeddings.weight" in stored) == (projection == "llm_proj")


# ---- in the place of the hub ----------------------------------------------------------------------------------


def weights_named(config) -> set[str]:
    model = config.model
    names = {model.sampler.weights, model.sampler.tokenizer, model.backbone.weights, model.flow.weights}
    checkpoints = [model.checkpoint] if isinstance(model.checkpoint, str) else model.checkpoint or []
    return {name for name in {*names, *checkpoints} if name and name != "checkpoint"}


def test_every_weight_that_a_model_config_names_is_written(out, written):
    folder = Path(variants.__file__).parents[1] / "configs" / "models"
    named = set()
    for file in folder.glob("*.yaml"):
        config = OmegaConf.create({"model": variants.complete(variants.load_variant(file).model)})
        named |= weights_named(config)
    assert len(named) >= 4
    newer = set() if can_be_written() else {model.hub_id for model in VIDEO_LLMS.values()}
    assert {name for name in named if not (out / name).exists()} <= newer


def test_size_options_are_keys_of_the_config():
    config = OmegaConf.create({"model": variants.complete({})})
    for option in size_options():
        assert isinstance(OmegaConf.select(config, option.split("=")[0]), int), option


# ---- the tool -------------------------------------------------------------------------------------------------


def digests(root: Path) -> dict[str, str]:
    files = (file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_same_bytes_every_time(out, written, tmp_path):
    only = [*SMALL, "lstp-7b-lora"]
    write_all(tmp_path / "again", only=only)
    again, before = digests(tmp_path / "again"), digests(out)
    assert len(again) > 40
    assert again == {name: before[name] for name in again}
    other = write_all(tmp_path / "other", only=["blip2-flan-t5-xl"], seed=1)["blip2-flan-t5-xl"]
    first, second = tensors(other), tensors(written["blip2-flan-t5-xl"])
    assert first.keys() == second.keys() and not any(torch.equal(first[key], second[key]) for key in first)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "a" / "b"
    assert main([str(out), "--only", "blip2-flan-t5-xl", "lavis-blip2-t5", "--image-size", "56", "--queries", "3"]) == 0
    printed = capsys.readouterr().out
    assert str(out / "Salesforce" / "blip2-flan-t5-xl") in printed and f"LAVIS_LSTP_WEIGHTS={out}" in printed
    stored = tensors(out / "Salesforce" / "blip2-flan-t5-xl")
    assert stored["vision_model.embeddings.position_embedding"].shape == (1, 17, 48)
    assert stored["query_tokens"].shape == (1, 3, 32)
    assert {path.name for path in out.iterdir()} == {"Salesforce", "lavis", tiny_checkpoints.MARKER}
    assert main([str(out), "--only", "blip2-flan-t5-xl"]) == 0, "a folder of ours is written to again"
    stored = tensors(out / "Salesforce" / "blip2-flan-t5-xl")
    assert stored["query_tokens"].shape == (1, DEFAULT.queries, 32)


def test_options_are_those_of_a_recipes_or_evaluations_data_sets_and_of_a_chains_steps(tmp_path, capsys):
    video, image = "datasets.lstp_video_instruct.image_size=28", "datasets.lstp_image_instruct.image_size=28"
    frames = "datasets.lstp_video_instruct.num_frames=8"
    cases = {"vicuna_ft": [image, video, frames], "sampler_vicuna7b": [video, frames]}
    cases["eval/nextqa_lstp_flant5xl"] = ["datasets.lstp_nextqa.image_size=28", "datasets.lstp_nextqa.num_frames=8"]
    for name, options in cases.items():
        assert main([str(tmp_path / "o"), "--options-for", f"projects/lstp/{name}.yaml"]) == 0
        assert capsys.readouterr().out.split() == [*size_options(), *options]
    assert main([str(tmp_path / "o"), "--options-for", "projects/lstp/chains/vicuna7b.yaml"]) == 0
    found = capsys.readouterr().out.split()
    assert {f"lstp:{image}", f"lstp:{frames}", f"spans:{video}"} < set(found) and f"spans:{image}" not in found
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--options-for", "projects/lstp/vicuna_fft.yaml"], "did you mean 'projects/lstp/vicuna_ft.yaml'?"),
        (["--options-for", str(Path(__file__))], "expected a recipe, an evaluation or one of the"),
        (["--only", "blip2-flan-t5"], "unknown tiny checkpoint 'blip2-flan-t5'; did you mean 'blip2-flan-t5-xl'?"),
        (["--image-size", "30"], "expected an image size that is a multiple of 14, got 30"),
        (["--queries", "0"], "expected at least 1 query token, got 0"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, capsys, arguments, message):
    assert main([str(tmp_path / "o"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and has no tiny_checkpoints.json"):
        write_all(tmp_path)
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        write_all(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_is_interrupted_leaves_the_old_folder(tmp_path, monkeypatch):
    folder = write_all(tmp_path / "o", only=["blip2-flan-t5-xl"])["blip2-flan-t5-xl"]
    before = digests(tmp_path)

    def broken(path: Path, **settings) -> None:
        path.mkdir()
        (path / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setitem(WRITERS, "blip2-flan-t5-xl", ("Salesforce/blip2-flan-t5-xl", broken))
    with pytest.raises(KeyboardInterrupt):
        write_all(tmp_path / "o", only=["blip2-flan-t5-xl"])
    assert digests(tmp_path) == before and len(list(folder.parent.iterdir())) == 1
