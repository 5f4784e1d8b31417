"""Tiny weights in the shape of the hub's, from which LAVIS's own models are built without a network.

LAVIS names its parts in code ("bert-base-uncased", `create_eva_vit_g`). `write_hub(root)` makes folders of those names
under `root`; from_pretrained finds them when `root` is the working directory. `with hub(root)` does both and puts a
two-layer EVA tower in place of the one with a billion parameters. Sizes and paths change, behaviour does not.

All numbers come from one seeded generator, so every transformers version sees the same weights. Keys are named as in
the published files: BERT's LayerNorms say gamma and beta, and it has neither position_ids nor a decoder weight; T5 has
an lm_head of its own (FLAN); OPT's lm_head is absent because it is tied.
"""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

IMAGE_SIZE = 28  # two by two patches of 14 pixels
WIDTH = 32
LAYERS = 2
HEADS = 4
QUERIES = 4
WORDS = "what who is the a picture of red blue green circle square moves left right first yes no it shape".split()
BERT_VOCAB = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "?"]
SEED = 20


class _Weights:
    """A state dict filled with seeded numbers."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, name: str, *shape: int, around: float = 0.0, scale: float = 0.2) -> None:
        self.tensors[name] = around + scale * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, size_out: int, size_in: int, bias: bool = True) -> None:
        self.add(f"{name}.weight", size_out, size_in)
        if bias:
            self.add(f"{name}.bias", size_out)

    def norm(self, name: str, size: int, names: tuple[str, str] = ("weight", "bias")) -> None:
        self.add(f"{name}.{names[0]}", size, around=1.0, scale=0.1)
        self.add(f"{name}.{names[1]}", size, scale=0.1)

    def save(self, folder: Path, config: dict) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_bert(folder: Path) -> None:
    """`bert-base-uncased`: config, vocab.txt, weights of a BERT with its masked-LM head."""
    w, old = _Weights(SEED), ("gamma", "beta")
    w.add("bert.embeddings.word_embeddings.weight", len(BERT_VOCAB), WIDTH)
    w.add("bert.embeddings.position_embeddings.weight", 64, WIDTH)
    w.add("bert.embeddings.token_type_embeddings.weight", 2, WIDTH)
    w.norm("bert.embeddings.LayerNorm", WIDTH, old)
    for i in range(LAYERS):
        layer = f"bert.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            w.linear(f"{layer}.attention.self.{part}", WIDTH, WIDTH)
        w.linear(f"{layer}.attention.output.dense", WIDTH, WIDTH)
        w.norm(f"{layer}.attention.output.LayerNorm", WIDTH, old)
        w.linear(f"{layer}.intermediate.dense", 2 * WIDTH, WIDTH)
        w.linear(f"{layer}.output.dense", WIDTH, 2 * WIDTH)
        w.norm(f"{layer}.output.LayerNorm", WIDTH, old)
    w.linear("bert.pooler.dense", WIDTH, WIDTH)
    w.add("cls.predictions.bias", len(BERT_VOCAB))
    w.linear("cls.predictions.transform.dense", WIDTH, WIDTH)
    w.norm("cls.predictions.transform.LayerNorm", WIDTH, old)
    w.save(folder, {"architectures": ["BertForMaskedLM"], **bert_config(len(BERT_VOCAB))})
    (folder / "vocab.txt").write_text("\n".join(BERT_VOCAB) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 64}))


def bert_config(vocab_size: int, **more) -> dict:
    return {
        "model_type": "bert",
        "vocab_size": vocab_size,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
        "pad_token_id": 0,
        **more,
    }


def write_t5(folder: Path) -> None:
    """A FLAN-T5: gated feed-forward, lm_head not tied to `shared`, a unigram tokenizer over whole words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = ["<pad>", "</s>", "<unk>", "▁?", *(f"▁{word}" for word in WORDS)]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - i / 100) for i, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", **special}))

    w = _Weights(SEED + 1)
    w.add("shared.weight", len(pieces), WIDTH)
    w.add("lm_head.weight", len(pieces), WIDTH)
    for stack in ("encoder", "decoder"):
        for i in range(LAYERS):
            parts = ("SelfAttention",) if stack == "encoder" else ("SelfAttention", "EncDecAttention")
            for j, part in enumerate(parts):
                for name in "qkvo":
                    w.linear(f"{stack}.block.{i}.layer.{j}.{part}.{name}", WIDTH, WIDTH, bias=False)
                w.add(f"{stack}.block.{i}.layer.{j}.layer_norm.weight", WIDTH, around=1.0)
            ff = f"{stack}.block.{i}.layer.{len(parts)}"
            w.linear(f"{ff}.DenseReluDense.wi_0", 2 * WIDTH, WIDTH, bias=False)
            w.linear(f"{ff}.DenseReluDense.wi_1", 2 * WIDTH, WIDTH, bias=False)
            w.linear(f"{ff}.DenseReluDense.wo", WIDTH, 2 * WIDTH, bias=False)
            w.add(f"{ff}.layer_norm.weight", WIDTH, around=1.0)
        w.add(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 32, HEADS)
        w.add(f"{stack}.final_layer_norm.weight", WIDTH, around=1.0)
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": len(pieces),
        "d_model": WIDTH,
        "d_kv": WIDTH // HEADS,
        "d_ff": 2 * WIDTH,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "num_heads": HEADS,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "dropout_rate": 0.1,
    }
    w.save(folder, config)


def write_opt(folder: Path) -> None:
    """An OPT in half precision, lm_head tied; a byte-level BPE tokenizer without merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet())]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "errors": "replace", **special})
    )

    w = _Weights(SEED + 2)
    w.add("model.decoder.embed_tokens.weight", len(symbols), WIDTH)
    w.add("model.decoder.embed_positions.weight", 66, WIDTH)
    w.norm("model.decoder.final_layer_norm", WIDTH)
    for i in range(LAYERS):
        layer = f"model.decoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            w.linear(f"{layer}.self_attn.{part}", WIDTH, WIDTH)
        w.linear(f"{layer}.fc1", 2 * WIDTH, WIDTH)
        w.linear(f"{layer}.fc2", WIDTH, 2 * WIDTH)
        w.norm(f"{layer}.self_attn_layer_norm", WIDTH)
        w.norm(f"{layer}.final_layer_norm", WIDTH)
    w.tensors = {name: tensor.half() for name, tensor in w.tensors.items()}
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": len(symbols),
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "ffn_dim": 2 * WIDTH,
        "max_position_embeddings": 64,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "dropout": 0.1,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "prefix": "</s>",
    }
    w.save(folder, config)


def write_vicuna(folder: Path) -> None:
    """A Vicuna as LAVIS's git main takes it: LLaMA's own tokenizer, without the tokens that InstructBLIP adds."""
    from lavis_lstp.testing.tiny_tokenizers import llama_files, vocabulary_size

    folder.mkdir(parents=True, exist_ok=True)
    files = llama_files()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer.model").write_bytes(files["tokenizer.model"])
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **special})
    )
    fast = json.loads(files["tokenizer.json"])
    fast["added_tokens"] = [token for token in fast["added_tokens"] if token["content"] != "[PAD]"]
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    fast["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(fast))

    w, size = _Weights(SEED + 4), vocabulary_size(files) - 1  # [PAD] is LAVIS's to add
    w.add("model.embed_tokens.weight", size, WIDTH)
    w.add("lm_head.weight", size, WIDTH)
    w.add("model.norm.weight", WIDTH, around=1.0, scale=0.1)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for part in "qkvo":
            w.linear(f"{layer}.self_attn.{part}_proj", WIDTH, WIDTH, bias=False)
        w.linear(f"{layer}.mlp.gate_proj", 2 * WIDTH, WIDTH, bias=False)
        w.linear(f"{layer}.mlp.up_proj", 2 * WIDTH, WIDTH, bias=False)
        w.linear(f"{layer}.mlp.down_proj", WIDTH, 2 * WIDTH, bias=False)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            w.add(f"{layer}.{norm}.weight", WIDTH, around=1.0, scale=0.1)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 256,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    w.save(folder, config)


def write_hub(root: Path) -> Path:
    """Everything that `build` needs, under `root`; returns `root`."""
    root = Path(root)
    write_bert(root / "bert-base-uncased")
    write_t5(root / "tiny-flan-t5")
    write_opt(root / "tiny-opt")
    torch.save({"model": {}}, root / "nothing.pth")  # LAVIS insists on loading a checkpoint
    med = bert_config(len(BERT_VOCAB) + 2, encoder_width=WIDTH, add_cross_attention=True, add_type_embeddings=False)
    (root / "med_config.json").write_text(json.dumps(med))
    return root


def _tiny_eva(img_size=IMAGE_SIZE, drop_path_rate=0.0, use_checkpoint=False, precision="fp32"):
    """`create_eva_vit_g` with its own layers, two of them, 32 wide, and no download."""
    from lavis.models.eva_vit import VisionTransformer, convert_weights_to_fp16

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + 3)
        model = VisionTransformer(
            img_size=img_size,
            patch_size=14,
            use_mean_pooling=False,
            embed_dim=WIDTH,
            depth=LAYERS,
            num_heads=HEADS,
            mlp_ratio=2.0,
            qkv_bias=True,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_checkpoint=use_checkpoint,
        )
    if precision == "fp16":
        convert_weights_to_fp16(model)
    return model


@contextlib.contextmanager
def hub(root: Path) -> Iterator[Path]:
    """Inside, `root` is the working directory and holds the weights, and LAVIS's BLIP-2 builds the tiny EVA tower."""
    import pytest

    import lavis_lstp

    lavis_lstp.register()
    from lavis.models.blip2_models import blip2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blip2, "create_eva_vit_g", _tiny_eva)
        patch.chdir(write_hub(root))
        yield root


def config(name: str, root: Path, **overrides) -> dict:
    """The `model` section of a LAVIS config for the tiny model `name`, which is built inside `hub`."""
    common = {"arch": name, "image_size": IMAGE_SIZE, "load_finetuned": False, "pretrained": str(root / "nothing.pth")}
    blip2 = {"vit_model": "eva_clip_g", "vit_precision": "fp32", "freeze_vit": True, "num_query_token": QUERIES}
    language_models = {
        "blip2": {},
        "blip2_image_text_matching": {},
        "blip2_t5": {"t5_model": str(root / "tiny-flan-t5")},
        "blip2_opt": {"opt_model": str(root / "tiny-opt"), "prompt": "a picture of"},
        "blip2_t5_instruct": {"t5_model": str(root / "tiny-flan-t5")},
        "blip2_vicuna_instruct": {"llm_model": str(root / "tiny-vicuna")},
    }
    return {**common, **blip2, **language_models[name], **overrides}


def build(name: str, root: Path, **overrides) -> torch.nn.Module:
    """A tiny LAVIS model in fp32, in eval mode, built inside `hub(root)`."""
    from lavis.common.registry import registry
    from omegaconf import OmegaConf

    if name in ("blip_caption", "blip_image_text_matching"):
        model = _blip(name, root)
    else:
        model = registry.get_model_class(name).from_config(OmegaConf.create(config(name, root, **overrides)))
    _fill_what_no_checkpoint_holds(model, name)
    return model.float().eval()


def _fill_what_no_checkpoint_holds(model: torch.nn.Module, name: str) -> None:
    """Seeded numbers by parameter name: constructors of different transformers versions draw in different orders."""
    blip2 = r"^(query_tokens|vision_proj|text_proj|itm_head)|crossattention"  # _query layers are copies
    pattern = {
        "blip2": blip2,
        "blip2_image_text_matching": blip2,
        "blip_caption": "",
        "blip_image_text_matching": "",
    }.get(name, r"^(query_tokens|t5_proj|opt_proj|llm_proj)|crossattention|(intermediate|output)_query")
    for key, parameter in model.named_parameters():
        if re.search(pattern, key) and "norm" not in key.lower():
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    # the embedding of [DEC], which LAVIS adds to the vocabulary
    if name in ("blip2", "blip2_image_text_matching") or name.endswith("instruct"):
        model.Qformer.get_input_embeddings().weight.data[-1] = torch.linspace(-0.4, 0.4, WIDTH)


def tiny_vit() -> torch.nn.Module:
    """BLIP's vision tower, two layers of it."""
    from lavis.models.vit import VisionTransformerEncoder

    encoder = VisionTransformerEncoder(
        img_size=IMAGE_SIZE, patch_size=14, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS, norm_layer=None
    )
    encoder.vision_width = WIDTH
    return encoder


def _blip(name: str, root: Path) -> torch.nn.Module:
    from lavis.models.blip_models.blip_caption import BlipCaption
    from lavis.models.blip_models.blip_image_text_matching import BlipITM
    from lavis.models.med import XBertEncoder, XBertLMHeadDecoder

    encoder = tiny_vit()
    text = {"med_config_path": str(root / "med_config.json")}
    if name == "blip_image_text_matching":
        return BlipITM(encoder, XBertEncoder.from_config(text), embed_dim=WIDTH // 2)
    decoder = XBertLMHeadDecoder.from_config(text)
    return BlipCaption(encoder, decoder, prompt="a picture of ")
