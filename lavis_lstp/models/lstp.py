"""LSTP, the model LAVIS sees: flow -> temporal sampler -> frame selector -> backbone -> frame fusion -> answer.

In: a batch of samples (`lavis_lstp.schema`). Out: losses in training, answers with the frames they came from in
evaluation. There is one class; what is called a model variant elsewhere is a YAML file that names five parts.
Source: LSTP, arXiv 2402.16050.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from lavis_lstp.batch import (
    blank_video,
    distinct_media,
    moves,
    readable,
    several_ranks,
    take_rows,
    weights_are_divided,
)
from lavis_lstp.errors import ConfigError, unknown_name
from lavis_lstp.models.answer.fusion import FrameFusion
from lavis_lstp.models.answer.qformer import Backbone
from lavis_lstp.models.answering import answer, score_options
from lavis_lstp.models.building import build_parts, check_settings
from lavis_lstp.models.refinement import ROWS, Refinement, pseudo_scores
from lavis_lstp.models.variants import MODEL_TYPES, complete, load_variant
from lavis_lstp.models.weights import parts
from lavis_lstp.models.weights.hub import sizes_of_weights
from lavis_lstp.models.where.flow import GIVEN
from lavis_lstp.models.where.frame_selector import sample_generators
from lavis_lstp.models.where.temporal_sampler import SamplerOutput, TemporalSampler, span_loss, spans_in_flows
from lavis_lstp.schema import NO_SPAN


class LSTP(BaseModel):
    """Video question answering from the few frames that the question asks for.

    Args:
        flow: FlowExtractor, uint8 frames [B,T,3,H,W] -> [B,T,2,H,W].
        sampler: TemporalSampler.
        selector: what turns logits, a given span or nothing into K frame indices.
        backbone: vision tower, Q-Former and language model.
        fusion: joins the K frames' query tokens.
        sampler_tokenizer: turns the question into the sampler's token ids.
        sampler_mode: "fusion" or "multi_modal", which layers of the sampler run.
        prompt, answer_template, sampler_prompt: templates with {question} or {answer}.
        train: parts that learn, of `parts.PREFIXES`; everything else is frozen and stays in eval mode.
        losses: of "lm" and "span"; "span" needs samples with a span, "lm" an answer.
        refinement: how pseudo spans are made in the training step; None = they come with the samples.
        mask_padding: False lets padded flows compete in the span loss, as published.
        frozen_dropout: True lets a language model that does not learn drop out in training, as published.
        sampler_max_tokens: questions are cut to this many tokens for the sampler.
        generation: default arguments of `generate`.
        seed: of the random frame selector in evaluation.
    """

    PRETRAINED_MODEL_CONFIG_DICT: Mapping[str, str] = {}
    KEPT_WHOLE = ("flow.model",)
    """RAFT stays in float32 and on each device: frozen, small, and wrong in bfloat16."""

    def __init__(
        self,
        *,
        flow: nn.Module,
        sampler: TemporalSampler,
        selector,
        backbone: Backbone,
        fusion: FrameFusion,
        sampler_tokenizer,
        sampler_mode: str = "fusion",
        prompt: str = "USER: <video>\n{question} ASSISTANT: ",
        answer_template: str = "{answer}</s>",
        sampler_prompt: str = "{question}",
        train: Sequence[str] = ("qformer", "query_tokens", "projection"),
        losses: Sequence[str] = ("lm",),
        refinement: Refinement | None = None,
        mask_padding: bool = True,
        frozen_dropout: bool = False,
        sampler_max_tokens: int = 128,
        generation: Mapping | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.flow = flow
        self.sampler = sampler
        self.selector = selector
        self.backbone = backbone
        self.fusion = fusion
        self.sampler_tokenizer = sampler_tokenizer
        self.sampler_mode = sampler_mode
        self.prompt = prompt
        self.answer_template = answer_template
        self.sampler_prompt = sampler_prompt
        self.losses = tuple(losses)
        self.refinement = refinement
        self.mask_padding = mask_padding
        self.frozen_dropout = frozen_dropout
        self.sampler_max_tokens = sampler_max_tokens
        self.generation = dict(generation or {})
        self.seed = seed
        self.train_parts = tuple(train)
        self._last_flow: tuple[Tensor, Tensor, Tensor] | None = None
        check_settings(self)
        parts.freeze_all_but(self, self.train_parts)
        self.sampler.freeze_unused_layers(self.sampler_mode)
        parts.hold_learning_in_float32(self)

    # ---- building ---------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, cfg) -> LSTP:
        """From a `model` section; `config/model.py` lists and explains every key."""
        cfg = complete(cfg)
        given = cfg["checkpoint"] or []
        checkpoints = [given] if isinstance(given, str) else given
        model = cls(**build_parts(cfg))
        for path in checkpoints:
            model.load_checkpoint(path)
        return model

    @classmethod
    def from_pretrained(cls, model_type: str) -> LSTP:
        """LAVIS's name for building a type of this model; where weights are looked for: `models/hub.py`."""
        return cls.from_config(cls.default_config(model_type).model)

    @classmethod
    def default_config_path(cls, model_type: str = "default") -> str:
        """Absolute path of a type's YAML, which holds what differs from the file it extends.

        Raises:
            ConfigError: the type is not known.
        """
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            raise ConfigError(unknown_name("model_type", model_type, cls.PRETRAINED_MODEL_CONFIG_DICT))
        return str(cls.PRETRAINED_MODEL_CONFIG_DICT[model_type])

    @classmethod
    def default_config(cls, model_type: str = "default") -> DictConfig:
        """A type's whole configuration, every key of it; sizes are those of tiny weights where they stand in.

        Raises:
            WeightsError: the file of these sizes (`hub.SIZES_FILE`) is damaged.
        """
        config = load_variant(cls.default_config_path(model_type))
        if config.model.backbone.weights:  # of the published weights; a model of random ones has its own sizes
            config = OmegaConf.merge(config, {"model": sizes_of_weights()})
        return config

    # ---- parts --------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> LSTP:
        """Frozen parts stay in eval mode, but for a language model with `frozen_dropout`."""
        super().train(mode)
        self._last_flow = None  # weights may change between
        parts.set_frozen_to_eval(self, (*self.train_parts, *(["language_model"] if self.frozen_dropout else [])))
        return self

    def trained_parts(self) -> dict[str, int]:
        """Part -> number of parameters that learn."""
        return parts.count_learning(self, self.train_parts)

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Weights and buffers of the parts that learn; frozen parts are never written."""
        prefixes, state = parts.prefixes_of(self), self.state_dict()
        return {key: value for key, value in state.items() if parts.part_of(key, prefixes) in self.train_parts}

    def load_trained_state_dict(self, state_dict: Mapping[str, Tensor], source: str = "checkpoint") -> list[str]:
        """See `parts.load_parts`."""
        return parts.load_parts(self, state_dict, source)

    def load_checkpoint(self, url_or_filename: str) -> list[str]:
        """LAVIS's name for `parts.load_parts_file`."""
        return parts.load_parts_file(self, url_or_filename)

    # ---- training ---------------------------------------------------------------------------------------------

    def forward(self, samples: Mapping) -> dict[str, Tensor]:
        """Losses of a batch; videos, images and texts may be mixed.

        Returns:
            {"loss", "lm_loss", "span_loss"}: scalars; a loss that the config does not ask for is 0 and detached.
        """
        samples = readable(samples)
        zero = torch.zeros((), device=self.device)
        losses = {"lm_loss": zero, "span_loss": zero}
        logits = None
        if "span" in self.losses:
            logits = self.sampler_logits(samples)
            target, mask = self._target_span(samples), self._flow_mask(samples)
            if self._has_own_flow(samples):
                counts = (m.sum(dim=1).to(target.device) for m in (samples["frame_mask"], mask))
                target = spans_in_flows(target, *counts)
            losses["span_loss"] = span_loss(
                logits.start_logits,
                logits.end_logits,
                target.to(self.device),
                mask.to(self.device),
                mask_padding=self.mask_padding,
            )
        if "lm" in self.losses:
            frame_index, _ = self.select(samples, logits)
            prompts = self.prompts(samples)
            prefix, prefix_mask = self.visual_prefix(samples, frame_index, prompts)
            answers = [self.answer_template.replace("{answer}", a) for a in samples["text_output"]]
            losses["lm_loss"] = self.backbone.lm_loss(prefix, prefix_mask, prompts, answers)
        return {"loss": losses["lm_loss"] + losses["span_loss"], **losses}

    def _target_span(self, samples: Mapping) -> Tensor:
        """The spans to learn, [B,2]: made here (self-refinement) or given; none for images and texts."""
        if self.refinement:
            span = self.refinement.spans(self, samples)
        elif "span" in samples:
            span = samples["span"]
        else:
            raise ConfigError(
                "the span loss (model.losses) needs samples with 'span'; set datasets.<name>.spans, or "
                "model.refinement.in_loop=true"
            )
        return span.where(moves(samples)[:, None].to(span.device), span.new_tensor(NO_SPAN))

    def prompts(self, samples: Mapping, template: str | None = None) -> list[str]:
        """What the language model reads: the data's own prompt where it has one (a conversation), else the template.

        Args:
            template: replaces the config's and the data's, with {question} or, as in LAVIS, {}.
        """
        given = samples.get("prompt") if template is None else None
        template = (template or self.prompt).replace("{}", "{question}")
        made = [template.replace("{question}", q) for q in samples["text_input"]]
        return [own or general for own, general in zip(given, made, strict=True)] if given else made

    # ---- the path from frames to a prefix -----------------------------------------------------------------------

    def _has_own_flow(self, samples: Mapping) -> bool:
        """Whether the data bring flow that is not one field a frame (`flow_mask`), and the model takes it."""
        return "flow_mask" in samples and self.flow.name in GIVEN

    def _flow_mask(self, samples: Mapping) -> Tensor:
        """[B,L], 1 = real: of the flows that the sampler sees."""
        return samples["flow_mask" if self._has_own_flow(samples) else "frame_mask"]

    def compute_flow(self, samples: Mapping) -> Tensor:
        """[B,T,2,S,S]; of a video that several questions are about it is computed once, over several batches, too."""
        first, which = distinct_media(samples)
        own = samples["flow_mask"] if self._has_own_flow(samples) else None
        frames, mask, given, own = (
            None if value is None else value[first.to(value.device)].to(self.device)
            for value in (samples["frames"], samples["frame_mask"], samples.get("flow"), own)
        )
        # a video with more questions than a batch has
        alone = len(first) == 1 and given is None and not (self.training or weights_are_divided(self))
        if alone and self._last_flow and all(map(torch.equal, self._last_flow, (frames, mask))):
            flow = self._last_flow[-1]
        else:
            with torch.no_grad():
                flow = self.flow(frames, mask, flow=given, flow_mask=own)
            self._last_flow = (frames, mask, flow) if alone else None
        return flow[which.to(self.device)]

    def _apply(self, *args, **kwargs) -> LSTP:
        self._last_flow = None  # it lies where the weights were
        return super()._apply(*args, **kwargs)

    def sampler_logits(self, samples: Mapping, flow: Tensor | None = None) -> SamplerOutput:
        """Start and end logits [B,T] of the videos; 0 for images and texts, which do not reach the sampler.

        With several ranks a batch without a video runs the sampler on a blank one, times 0: each rank must run the
        same modules in the same order, or those that exchange gradients or weights wait for ever.
        """
        is_video = moves(samples)
        if is_video.all():
            return self._video_logits(samples, flow)
        rows = is_video.nonzero()[:, 0]
        zeros = torch.zeros(self._flow_mask(samples).shape, device=self.device)
        if len(rows):
            videos = take_rows(samples, rows)
            found = self._video_logits(videos, None if flow is None else flow[rows.to(flow.device)])
            rows = rows.to(self.device)
            start, end = (zeros.index_copy(0, rows, x.float()) for x in (found.start_logits, found.end_logits))
        elif several_ranks() or self.losses == ("span",):  # which must not be left without any gradient
            blank = self._video_logits(blank_video(samples))
            nothing = 0 * (blank.start_logits.sum() + blank.end_logits.sum())
            start, end = zeros + nothing, zeros + nothing
        else:
            start, end = zeros, zeros
        return SamplerOutput(None, start, end)

    def _video_logits(self, samples: Mapping, flow: Tensor | None = None) -> SamplerOutput:
        flow = self.compute_flow(samples) if flow is None else flow
        texts = [self.sampler_prompt.replace("{question}", q) for q in samples["text_input"]]
        tokens = self.sampler_tokenizer(
            texts,
            padding="longest",
            truncation=True,
            max_length=self.sampler_max_tokens,
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(self.device)
        mask = self._flow_mask(samples).to(self.device)
        grad = nullcontext() if "sampler" in self.train_parts else torch.no_grad()
        with grad:
            return self.sampler(flow, mask, tokens["input_ids"], tokens["attention_mask"], mode=self.sampler_mode)

    def select(self, samples: Mapping, logits: SamplerOutput | None = None) -> tuple[Tensor, Tensor]:
        """K frame indices, -1 where a sample has none, and the span they come from."""
        if self.selector.needs_logits and logits is None:
            with torch.no_grad():
                logits = self.sampler_logits(samples)
        return self.selector(
            samples["frame_mask"].cpu(),
            start_logits=None if logits is None else logits.start_logits,
            end_logits=None if logits is None else logits.end_logits,
            span=self._given_span(samples),
            generators=self.row_generators(samples),
            flow_mask=self._flow_mask(samples).cpu() if self._has_own_flow(samples) else None,
        )

    def _given_span(self, samples: Mapping) -> Tensor | None:
        if not self.selector.needs_span:
            return None
        key = self.selector.span_key
        if key == "gold_span" and self.training:
            raise ConfigError(
                "selector 'given' with span_key 'gold_span' is for evaluation; training never sees gold spans"
            )
        if key not in samples:
            raise ConfigError(f"selector 'given' needs samples with '{key}'; set datasets.<name>.spans")
        span, count = samples[key].cpu(), samples["frame_mask"].sum(dim=1).cpu()
        whole = torch.stack([torch.zeros_like(count), count], dim=1)
        known = moves(samples)
        if key == "span" and "no_moment" in samples:  # a span file knows the question, and no moment of its video
            known = known & ~samples["no_moment"].cpu().bool()
        return span.where(known[:, None], whole)

    def row_generators(self, samples: Mapping) -> list[torch.Generator]:
        """One a row: in training from torch's global state, which checkpoints keep; in evaluation from the
        question's id, so that the draw does not depend on batch size, order or rank."""
        if self.training:
            seeds = torch.randint(2**62, (len(samples["text_input"]),)).tolist()
            return [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample_generators(samples.get("question_id") or samples["text_input"], self.seed)

    def visual_prefix(self, samples: Mapping, frame_index: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """The frames at `frame_index` [B,K] -> visual prefix [B,S,D_llm] and its mask [B,S].

        The vision tower looks at a frame once, however many questions chose it; the Q-Former does where it does not
        read the question. A batch of texts alone looks at one blank frame, whose tokens are masked out, so that each
        rank runs the same modules.
        """
        frames = samples["frames"]
        index = frame_index.cpu()
        real = index >= 0
        rows = torch.arange(len(index))[:, None].expand_as(index)
        if real.any():
            first, which = distinct_media(samples)
            pairs, place = torch.unique(torch.stack([rows[real], index[real]], dim=1), dim=0, return_inverse=True)
            texts = [prompts[row] for row in pairs[:, 0].tolist()]
            pairs[:, 0] = which[pairs[:, 0]]
            pairs, seen = torch.unique(pairs, dim=0, return_inverse=True)
            chosen = frames[first[pairs[:, 0]].to(frames.device), pairs[:, 1].to(frames.device)]
        else:
            chosen, texts = frames.new_zeros(1, *frames.shape[2:]), prompts[:1]
            place, seen = index.new_zeros(0), index.new_zeros(1)
        features, seen = self.image_features(chosen.to(self.device)), seen.to(self.device)
        if self.backbone.reads_question:
            tokens = self.backbone.frame_tokens(features[seen], texts)  # [pairs of question and frame,Q,D]
        else:
            tokens = self.backbone.frame_tokens(features, [""] * len(features))[seen]
        where = torch.zeros_like(index).masked_scatter(real, place).to(tokens.device)
        return self.fusion(tokens[where], real.long().to(tokens.device), self.backbone.project)

    def image_features(self, frames: Tensor) -> Tensor:
        """uint8 frames [M,3,H,W] -> [M,P,D], without gradient unless the vision tower learns."""
        with nullcontext() if "vision" in self.train_parts else torch.no_grad():
            return self.backbone.image_features(frames)

    # ---- answers ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def locate(self, samples: Mapping) -> dict[str, Tensor]:
        """The span the sampler predicts and the frames the selector takes.

        Returns:
            span int64 [B,2], half-open; frame_index int64 [B,K], sorted; and, where the selector or the span loss
            uses the sampler, start_logits and end_logits float32 [B,T].
        """
        samples = readable(samples)
        logits = self.sampler_logits(samples) if self.selector.needs_logits or "span" in self.losses else None
        frame_index, span = self.select(samples, logits)
        found = {"span": span, "frame_index": frame_index}
        if logits is not None:
            found["start_logits"] = logits.start_logits.float().cpu()
            found["end_logits"] = logits.end_logits.float().cpu()
        return found

    def answer(self, samples: Mapping, prompt: str | None = None, **generation) -> dict:
        """Everything an answer is made of.

        Args:
            prompt: template to use instead of the config's.
            generation: transformers' generation arguments, over those of the config.

        Returns:
            prediction, prompt (lists of B strings), log_prob (of the prediction's tokens: sum, mean and number), span
            [B,2], frame_index [B,K], start_logits and end_logits where there are any, flow [B,T,2,S,S] where it was
            needed, and seconds by stage (of the whole batch).
        """
        return answer(self, readable(samples), prompt, {**self.generation, **generation})

    def score_options(self, samples: Mapping, prompt: str | None = None) -> dict:
        """How likely each of `samples["options"]` is as the answer.

        Returns:
            as `answer`, but in place of prediction and log_prob, for each row and each of its options, option_log_prob,
            and option_greedy: whether greedy search would give just this option.
        """
        return score_options(self, readable(samples), prompt)

    def generate(
        self,
        samples: Mapping,
        use_nucleus_sampling: bool = False,
        num_beams: int | None = None,
        max_length: int | None = None,
        min_length: int | None = None,
        **generation,
    ) -> list[str]:
        """Answers of a batch; arguments as in LAVIS, or as in transformers.

        Lengths are those of the answer alone, without prompt and visual prefix.
        """
        settings = dict(generation)
        if use_nucleus_sampling:
            settings["do_sample"] = True
        for name, value in (
            ("num_beams", num_beams),
            ("max_new_tokens", max_length),
            ("min_new_tokens", min_length),
            ("num_return_sequences", settings.pop("num_captions", None)),  # LAVIS's name
        ):
            if value is not None:
                settings.setdefault(name, value)
        return self.answer(samples, **settings)["prediction"]

    def predict_answers(
        self,
        samples: Mapping,
        num_beams: int | None = None,
        inference_method: str = "generate",
        max_len: int | None = None,
        min_len: int | None = None,
        num_ans_candidates: int | None = None,
        answer_list: Sequence[str] | None = None,
        **generation,
    ) -> list[str]:
        """LAVIS's name for answering questions. Ranking a list of answers is not supported.

        Raises:
            ConfigError: for an `inference_method` other than "generate".
        """
        if inference_method != "generate":
            raise ConfigError(f"inference_method '{inference_method}' is not supported by LSTP; use 'generate'")
        return self.generate(samples, num_beams=num_beams, max_length=max_len, min_length=min_len, **generation)

    def pseudo_scores(self, samples: Mapping, rows: int = ROWS) -> Tensor:
        """How well each frame alone answers the question, float32 [B,T] of 0..1; see `refinement.pseudo_scores`."""
        return pseudo_scores(self, readable(samples), self.generation, rows)


def register_models(names: Iterable[str] = tuple(MODEL_TYPES)) -> None:
    """Puts a name of LSTP for each entry of `MODEL_TYPES` into LAVIS's registry."""
    for name in names:
        types = {kind: str(path) for kind, path in MODEL_TYPES[name].items()}
        class_name = "".join(word.capitalize() for word in name.split("_"))
        variant = type(class_name, (LSTP,), {"PRETRAINED_MODEL_CONFIG_DICT": types, "__module__": __name__})
        registry.register_model(name)(variant)


register_models()
