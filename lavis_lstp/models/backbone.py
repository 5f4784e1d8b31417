"""Vision tower, Q-Former and language model: an adapter over transformers' InstructBLIP and BLIP-2 classes.

In: pixels and strings. Out: query tokens per frame, the loss of an answer, generated answers. The language model
is called on embeddings built here (prefix, then text) and not through the classes' own `forward`, whose contract
with image placeholders changed between transformers releases. Checkpoints are the published ones: the module
`model` has the state dict of `InstructBlipForConditionalGeneration` or `Blip2ForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lavis_lstp.errors import ConfigError, WeightsError, unknown_name
from lavis_lstp.models.tiny_tokenizer import tiny_tokenizer

FAMILIES = ("instructblip", "blip2")
DTYPES = ("float32", "bfloat16", "float16")
HUB_IDS = {"instructblip": "Salesforce/instructblip-vicuna-7b", "blip2": "Salesforce/blip2-flan-t5-xl"}
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
IGNORED = -100
"""Label of a position that takes no part in the loss."""


def _classes(family: str):
    if family not in FAMILIES:
        raise ConfigError(unknown_name("backbone family", family, FAMILIES))
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
    )

    if family == "instructblip":
        return InstructBlipConfig, InstructBlipForConditionalGeneration
    return Blip2Config, Blip2ForConditionalGeneration


class Backbone(nn.Module):
    """One class for both families and both kinds of language model (T5: encoder-decoder, LLaMA: decoder-only).

    Args:
        model: the transformers model.
        tokenizer: of the language model.
        qformer_tokenizer: for InstructBLIP, whose Q-Former reads the prompt too; None for BLIP-2.
        max_text_tokens: prompts and answers are cut to this many tokens (published: 128 for video data).
    """

    PARTS: Mapping[str, tuple[str, ...]] = {
        "vision": ("model.vision_model.",),
        "qformer": ("model.qformer.",),
        "query_tokens": ("model.query_tokens",),
        "projection": ("model.language_projection.",),
        "language_model": ("model.language_model.",),
    }
    """Part -> how the keys of its weights begin."""

    def __init__(self, model: nn.Module, tokenizer, qformer_tokenizer=None, *, max_text_tokens: int = 128):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.qformer_tokenizer = qformer_tokenizer
        self.max_text_tokens = max_text_tokens
        mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
        self.register_buffer("image_mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", std.view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, path: str, *, family: str, dtype: str = "float32", max_text_tokens: int = 128) -> Backbone:
        """From a hub id or a folder in the hub's layout (config, safetensors, tokenizer files).

        Raises:
            WeightsError: files or weights are missing, damaged or of other shapes; the line says which, and where from.
        """
        from safetensors import SafetensorError
        from transformers import AutoTokenizer

        _, model_class = _classes(family)
        try:
            model, found = model_class.from_pretrained(path, dtype=getattr(torch, dtype), output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(path)
            qformer_tokenizer = None
            if family == "instructblip":
                folder = Path(path) / "qformer_tokenizer"
                where = {"pretrained_model_name_or_path": str(folder)} if folder.is_dir() else None
                where = where or {"pretrained_model_name_or_path": path, "subfolder": "qformer_tokenizer"}
                qformer_tokenizer = AutoTokenizer.from_pretrained(**where)
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise WeightsError(
                f"no {family} weights at '{path}' (model.backbone.weights): expected a hub id that is cached or can be "
                f"reached, such as {HUB_IDS[family]}, or a folder with its files (config.json, *.safetensors and "
                "tokenizer files) downloaded from huggingface.co; "
                f"transformers says: {str(error).strip().splitlines()[0]}"
            ) from error
        if missing := sorted(found["missing_keys"]):
            raise WeightsError(
                f"'{path}' (model.backbone.weights) lacks {len(missing)} weights of {family}, first {missing[0]}; "
                "is it of another model.backbone.family?"
            )
        return cls(model, tokenizer, qformer_tokenizer, max_text_tokens=max_text_tokens)

    @classmethod
    def from_config_dict(cls, config: Mapping, *, family: str, seed: int = 0, max_text_tokens: int = 128) -> Backbone:
        """With random weights drawn from `seed`, and the built-in tokenizer: for tests and models trained from nothing.

        Args:
            config: what the family's transformers config class takes (vision_config, qformer_config, text_config,
                num_query_tokens). Vocabulary sizes and special ids are filled in.
        """
        config_class, model_class = _classes(family)
        parts = {key: dict(value) if isinstance(value, Mapping) else value for key, value in dict(config).items()}
        is_t5 = parts["text_config"].get("model_type") == "t5"
        tokenizer = tiny_tokenizer(bos=not is_t5, eos=is_t5)
        ids = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        if is_t5:
            ids["decoder_start_token_id"] = tokenizer.pad_token_id
        parts["text_config"] = {**parts["text_config"], **ids}
        parts["qformer_config"] = {**parts["qformer_config"], "vocab_size": len(tokenizer)}
        parts["qformer_config"]["encoder_hidden_size"] = parts["vision_config"]["hidden_size"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config_class(**parts))
            # transformers leaves the query tokens at zero, from which identical queries never part
            nn.init.trunc_normal_(model.query_tokens, std=0.02)
        return cls(
            model,
            tokenizer,
            tiny_tokenizer(bos=False) if family == "instructblip" else None,
            max_text_tokens=max_text_tokens,
        )

    # ---- the parts; all that differs in a subclass over other classes' models --------------------------------------

    @property
    def vision_model(self) -> nn.Module:
        return self.model.vision_model

    @property
    def qformer(self) -> nn.Module:
        return self.model.qformer

    @property
    def query_tokens(self) -> Tensor:
        """[1,Q,D]"""
        return self.model.query_tokens

    @property
    def projection(self) -> nn.Linear:
        return self.model.language_projection

    @property
    def language_model(self) -> nn.Module:
        return self.model.language_model

    @property
    def is_encoder_decoder(self) -> bool:
        """T5 is; LLaMA, which goes on from the prompt, is not."""
        return self.language_model.config.is_encoder_decoder

    @property
    def num_query_tokens(self) -> int:
        return self.query_tokens.shape[1]

    @property
    def image_size(self) -> int:
        """Side of the frames that the vision tower takes, in px."""
        return self.model.config.vision_config.image_size

    def _vision(self, pixels: Tensor) -> Tensor:
        """Normalised frames [M,3,S,S] -> last hidden state, after its layer norm [M,P,D_vision]."""
        return self.vision_model(pixel_values=pixels).last_hidden_state

    def _qformer(self, queries: Tensor, features: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The Q-Former's last hidden state [M,Q or more,D].

        Args:
            queries: [M,Q,D]; features: [M,P,D_vision].
            text: input_ids [M,S] and attention_mask [M,Q+S] where the Q-Former reads the prompt, else nothing.
        """
        ones = features.new_ones(features.shape[:2], dtype=torch.long)
        return self.qformer(
            query_embeds=queries, encoder_hidden_states=features, encoder_attention_mask=ones, **text
        ).last_hidden_state

    # ---- vision -----------------------------------------------------------------------------------------------

    def image_features(self, frames: Tensor) -> Tensor:
        """uint8 frames [M,3,H,W] -> vision tower's last hidden state (after its layer norm) [M,P,D_vision].

        Raises:
            ConfigError: the frames are not of the vision tower's size.
        """
        size = self.image_size
        if tuple(frames.shape[-2:]) != (size, size):
            raise ConfigError(
                f"the vision tower takes frames of {size}x{size} px, the data set gives "
                f"{frames.shape[-1]}x{frames.shape[-2]}; set datasets.<name>.image_size: {size}"
            )
        pixels = (frames.to(self.image_mean.dtype) / 255 - self.image_mean) / self.image_std
        return self._vision(pixels)

    def frame_tokens(self, features: Tensor, prompts: list[str]) -> Tensor:
        """Q-Former output per frame.

        Args:
            features: [M,P,D_vision], one row per frame.
            prompts: M strings, the prompt of each frame's sample (InstructBLIP's Q-Former reads it; BLIP-2's not).

        Returns:
            [M,Q,D]: the outputs at the Q query positions.
        """
        count = features.shape[0]
        queries = self.query_tokens.expand(count, -1, -1)
        inputs = {}
        if self.qformer_tokenizer is not None:
            unique = list(dict.fromkeys(prompts))
            text = self._tokenize(self.qformer_tokenizer, unique, "right").to(features.device)
            row = torch.tensor([unique.index(p) for p in prompts], device=features.device)
            ones = text["attention_mask"].new_ones(count, queries.shape[1])
            inputs["input_ids"] = text["input_ids"][row]
            inputs["attention_mask"] = torch.cat([ones, text["attention_mask"][row]], dim=1)
        return self._qformer(queries, features, inputs)[:, : queries.shape[1]]

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens of the Q-Former [...,D] -> what the language model reads [...,D_llm]."""
        return self.projection(tokens.to(self.projection.weight.dtype))

    # ---- language ---------------------------------------------------------------------------------------------

    def _tokenize(self, tokenizer, texts: list[str], side: str):
        return tokenizer(
            texts,
            padding="longest",
            truncation=True,
            max_length=self.max_text_tokens,
            padding_side=side,
            return_tensors="pt",
            return_token_type_ids=False,
        )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=self.max_text_tokens)["input_ids"]

    def lm_loss(self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], answers: list[str]) -> Tensor:
        """Cross entropy of the answers' tokens, averaged over all answer tokens of the batch (published behaviour).

        Args:
            prefix: visual prefix [B,P,D_llm]; prefix_mask: [B,P].
            prompts, answers: B strings each; the answer carries its own end mark where the family needs one.
        """
        if self.is_encoder_decoder:
            text = self._tokenize(self.tokenizer, prompts, "right").to(prefix.device)
            inputs, mask = self._with_prefix(prefix, prefix_mask, text["input_ids"], text["attention_mask"])
            target = self._tokenize(self.tokenizer, answers, "right").to(prefix.device)
            labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORED)
            return self.language_model(inputs_embeds=inputs, attention_mask=mask, labels=labels).loss
        ids, labels = [], []
        for prompt, answer in zip(self._ids(prompts), self._ids(answers), strict=True):
            answer = answer[1:]  # its beginning-of-text mark; the prompt has one
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([IGNORED] * len(prompt) + answer))
        real = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(prefix.device)
        ids = pad_sequence(ids, batch_first=True, padding_value=self._pad_id).to(prefix.device)
        labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED).to(prefix.device)
        inputs, mask = self._with_prefix(prefix, prefix_mask, ids, real)
        labels = torch.cat([labels.new_full(prefix_mask.shape, IGNORED), labels], dim=1)
        return self.language_model(inputs_embeds=inputs, attention_mask=mask, labels=labels).loss

    @torch.no_grad()
    def generate(self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], **settings) -> list[str]:
        """Answers, one string a row; `settings` are transformers' generation arguments (max_new_tokens, ...)."""
        text = self._tokenize(self.tokenizer, prompts, "right").to(prefix.device)
        inputs, mask = self._with_prefix(prefix, prefix_mask, text["input_ids"], text["attention_mask"])
        if not self.is_encoder_decoder:
            inputs, mask = _left_padded(inputs, mask)
        # 5.x warns about, and 4.x obeys, ids of the text config that are wrong in published checkpoints
        ids = self.language_model.generate(
            inputs_embeds=inputs,
            attention_mask=mask,
            pad_token_id=self._pad_id,
            eos_token_id=self._end_ids,
            **settings,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @property
    def _pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def _end_ids(self) -> list[int]:
        """Of an answer. Published LLaMA checkpoints end with 0 as well (SPEC 6), which no tokenizer of theirs emits."""
        return [self.tokenizer.eos_token_id] + ([] if self.is_encoder_decoder else [0])

    def _with_prefix(self, prefix: Tensor, prefix_mask: Tensor, ids: Tensor, mask: Tensor):
        embedded = self.language_model.get_input_embeddings()(ids)
        return (
            torch.cat([prefix.to(embedded.dtype), embedded], dim=1),
            torch.cat([prefix_mask, mask], dim=1),
        )


def _left_padded(inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves every row's real positions, in order, to the right end.

    Generation of a decoder-only model goes on from the last position, so that must be a real one; padding inside a
    row (a sample with fewer frames than others) goes to the front as well.
    """
    order = torch.argsort(mask, dim=1, stable=True)  # zeros first, order kept on both sides
    return inputs.gather(1, order[:, :, None].expand_as(inputs)), mask.gather(1, order)


def build_backbone(
    family: str,
    *,
    weights: str | None = None,
    config: Mapping | None = None,
    dtype: str = "float32",
    seed: int = 0,
    max_text_tokens: int = 128,
    **still_to_come,
) -> Backbone:
    """From `weights` (hub id or folder), else with random ones of the sizes in `config`.

    Raises:
        WeightsError: neither is given, or the weights are missing.
    """
    if dtype not in DTYPES:
        raise ConfigError(unknown_name("dtype (model.backbone.dtype)", dtype, DTYPES))
    if weights:
        return Backbone.from_pretrained(weights, family=family, dtype=dtype, max_text_tokens=max_text_tokens)
    if not config:
        raise WeightsError(
            "model.backbone.weights is empty: expected a hub id or a folder, "
            "or model.backbone.config for random weights"
        )
    backbone = Backbone.from_config_dict(config, family=family, seed=seed, max_text_tokens=max_text_tokens)
    return backbone.to(getattr(torch, dtype))


def sampler_tokenizer(path: str | None, backbone: Backbone):
    """The temporal sampler's tokenizer, BERT's: from `path`, else the Q-Former's own, else the built-in one.

    Raises:
        WeightsError: there is none at `path`.
    """
    if not path:
        return backbone.qformer_tokenizer or tiny_tokenizer(bos=False)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise WeightsError(
            f"no tokenizer at '{path}' (model.sampler.tokenizer): expected a hub id or a folder with "
            "tokenizer files, such as bert-base-uncased"
        ) from error
