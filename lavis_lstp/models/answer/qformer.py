"""The answerer of the paper: vision tower, Q-Former and language model, over transformers' InstructBLIP and BLIP-2.

In: frames and prompts. Out: a reading of them, through query tokens per frame and their fusion. The language model
is called on embeddings built here (prefix, then text) and not through the classes' own `forward`, whose contract
with image placeholders changed between transformers releases. Checkpoints are the published ones: the module
`model` has the state dict of `InstructBlipForConditionalGeneration` or `Blip2ForConditionalGeneration`.
InstructBlipVideo is InstructBLIP with fusion concat: the tokens of all frames end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lavis_lstp.errors import ConfigError, WeightsError, unknown_name
from lavis_lstp.models.answer.answerer import refuse_marks, with_times
from lavis_lstp.models.answer.fusion import FrameFusion
from lavis_lstp.models.answer.language import LanguageAnswerer, PrefixReading, _ids_of
from lavis_lstp.models.answer.loading import DTYPES, dtype_of, from_sizes, load_published
from lavis_lstp.models.pixels import IMAGE_MEAN, IMAGE_STD


class Backbone(LanguageAnswerer):
    """One class for both families and both kinds of language model (T5: encoder-decoder, LLaMA: decoder-only).

    Args:
        model: the transformers model.
        tokenizer: of the language model.
        qformer_tokenizer: for InstructBLIP, whose Q-Former reads the prompt too; None for BLIP-2.
        max_text_tokens: prompts and answers are cut to this many tokens (published: 128 for video data).
        fusion: how the K frames' query tokens become one prefix, a name of `FrameFusion`.
    """

    PARTS: Mapping[str, tuple[str, ...]] = {
        "vision": ("model.vision_model.",),
        "qformer": ("model.qformer.",),
        "query_tokens": ("model.query_tokens",),
        "projection": ("model.language_projection.",),
        "language_model": ("model.language_model.",),
    }
    """Part -> how the keys of its weights begin."""
    marks: Sequence[str] = ()
    """What a prompt may not contain: the tokenizer takes it for a place of a frame."""
    times_in_prompt = False

    def __init__(
        self, model: nn.Module, tokenizer, qformer_tokenizer=None, *, max_text_tokens: int = 128, fusion: str = "mean"
    ):
        super().__init__(tokenizer, max_text_tokens=max_text_tokens)
        self.model = model
        self.qformer_tokenizer = qformer_tokenizer
        self.fusion = FrameFusion(fusion)

    @classmethod
    def from_pretrained(
        cls, path: str, *, family: str, max_text_tokens: int = 128, fusion: str = "mean", **settings
    ) -> Backbone:
        """Published weights; `settings` as for `loading.load_published`."""
        return cls(*load_published(path, family=family, **settings), max_text_tokens=max_text_tokens, fusion=fusion)

    @classmethod
    def from_config_dict(
        cls, config: Mapping, *, family: str, max_text_tokens: int = 128, fusion: str = "mean", **settings
    ) -> Backbone:
        """Random weights; `settings` as for `loading.from_sizes`."""
        return cls(*from_sizes(config, family=family, **settings), max_text_tokens=max_text_tokens, fusion=fusion)

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
    def reads_question(self) -> bool:
        """The Q-Former does, so that what it sees in a frame depends on the question."""
        return self.qformer_tokenizer is not None

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
        mean, std = (torch.tensor(x, device=frames.device)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
        return self._vision(((frames.float() / 255 - mean) / std).to(dtype_of(self.vision_model)))

    def frame_tokens(self, features: Tensor, prompts: list[str]) -> Tensor:
        """Q-Former output per frame.

        Args:
            features: [M,P,D_vision], one row per frame.
            prompts: M strings, the prompt of each frame's sample (InstructBLIP's Q-Former reads it; BLIP-2's not).

        Returns:
            [M,Q,D]: the outputs at the Q query positions.
        """
        count = features.shape[0]
        dtype = dtype_of(self.qformer)
        features, queries = features.to(dtype), self.query_tokens.to(dtype).expand(count, -1, -1)
        inputs = {}
        if self.reads_question:
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

    @property
    def _end_ids(self) -> list[int]:
        """Ids that end an answer; beside the usual ones those of the model's own config.

        A decoder-only model ends at the padding of its config as well, and at the begin mark of its config where that
        is not the tokenizer's. The text config of published LLaMA checkpoints has 0 and 1 as marks, their tokenizer 1
        and 2; with them, an id 0 in an output means the end.
        """
        if self.is_encoder_decoder:
            return super()._end_ids
        config = self.language_model.config
        other_begin = config.bos_token_id if config.bos_token_id != self.tokenizer.bos_token_id else None
        return _ids_of(*super()._end_ids, config.pad_token_id, config.eos_token_id, other_begin)

    def look(self, frames: Tensor, which: Tensor, prompts: list[str], times_s: Tensor | None = None) -> PrefixReading:
        """See `Answerer.look`: frames uint8 [U,3,H,W], which int64 [B,K]; the times are used in the prompt alone.

        The Q-Former looks at a frame once where it does not read the question, else once for each question.
        """
        which = which.cpu()
        real = which >= 0
        for prompt in prompts:
            refuse_marks(prompt, self.marks)
        if self.times_in_prompt and times_s is not None:
            shown = [row[there].tolist() for row, there in zip(times_s.cpu(), real, strict=True)]
            prompts = [with_times(prompt, seconds) for prompt, seconds in zip(prompts, shown, strict=True)]
        with nullcontext() if self._vision_learns() else torch.no_grad():
            features = self.image_features(frames)
        if self.reads_question and real.any():
            rows = torch.arange(len(which))[:, None].expand_as(which)
            pairs, place = torch.unique(torch.stack([rows[real], which[real]], dim=1), dim=0, return_inverse=True)
            asked = [prompts[row] for row in pairs[:, 0].tolist()]
            tokens = self.frame_tokens(features[pairs[:, 1].to(features.device)], asked)
        else:
            tokens, place = self.frame_tokens(features, prompts[:1] * len(features)), which[real]
        where = torch.zeros_like(which).masked_scatter(real, place).to(tokens.device)
        return self.reading(*self.fusion(tokens[where], real.long().to(tokens.device), self.project), prompts)

    def _vision_learns(self) -> bool:
        return any(
            parameter.requires_grad
            for name, parameter in self.named_parameters()
            if name.startswith(self.PARTS["vision"])
        )


def build(
    family: str = "instructblip",
    *,
    weights: str | None = None,
    config: Mapping | None = None,
    dtype: str = "float32",
    seed: int = 0,
    max_text_tokens: int = 128,
    attention: str | None = None,
    quantization: str | None = None,
    fusion: str = "mean",
) -> Backbone:
    """Source `hub`: from `weights` (hub id or folder), else with random ones of the sizes in `config`.

    Args:
        family: instructblip or blip2.
        dtype: of what does not learn.
        attention: transformers' attention implementation; None = its own choice.
        quantization: 8bit or 4bit, of the language model.

    Raises:
        WeightsError: neither is given, or the weights are missing.
        ConfigError: a setting is not known, or this machine cannot follow it.
    """
    if dtype not in DTYPES:
        raise ConfigError(unknown_name("dtype (model.backbone.dtype)", dtype, DTYPES))
    common = {
        "family": family,
        "dtype": dtype,
        "attention": attention,
        "max_text_tokens": max_text_tokens,
        "fusion": fusion,
    }
    if weights:
        return Backbone.from_pretrained(weights, quantization=quantization, **common)
    if quantization:
        raise ConfigError("model.backbone.quantization needs model.backbone.weights; random ones are not quantised")
    if not config:
        raise WeightsError(
            "model.backbone.weights is empty: expected a hub id or a folder, "
            "or model.backbone.config for random weights"
        )
    return Backbone.from_config_dict(config, seed=seed, **common)
