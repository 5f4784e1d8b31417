"""LSTP, the model LAVIS sees: a chooser of frames and an answerer, under LAVIS's names.

In: a batch of samples (`lavis_lstp.schema`). Out: losses in training, answers with the frames they came from in
evaluation. There is one class; what is called a model variant elsewhere is a YAML file that names the parts: flow ->
temporal sampler -> frame selector (`models/where`), vision and language (`models/answer`).
Source: LSTP, arXiv 2402.16050.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from lavis_lstp.batch import chosen_frames, is_hidden, moves, readable
from lavis_lstp.config.fields import generation_over
from lavis_lstp.data.subtitles import nearest_first
from lavis_lstp.errors import AnnotationError, ConfigError, WeightsError, unknown_name
from lavis_lstp.models.answer.answerer import GivenUp, Reading
from lavis_lstp.models.answering import answer, score_options, stream
from lavis_lstp.models.building import build_parts, check_settings
from lavis_lstp.models.refinement import ROWS, Refinement, pseudo_scores
from lavis_lstp.models.subtitles import shown_in
from lavis_lstp.models.variants import MODEL_TYPES, complete, load_variant
from lavis_lstp.models.weights import parts
from lavis_lstp.models.weights.hub import as_checkpoint, local_path, sizes_of_weights
from lavis_lstp.models.weights.recorded import recorded_model
from lavis_lstp.models.weights.sharing import push_to_hub
from lavis_lstp.models.where.chooser import Chooser
from lavis_lstp.models.where.frame_selector import FrameSelector
from lavis_lstp.models.where.temporal_sampler import likeliest_span, span_loss, spans_in_flows
from lavis_lstp.schema import NO_SPAN, Batch


class LSTP(BaseModel):
    """Video question answering from the few frames that the question asks for.

    Args:
        chooser: where to look. Its signal and its sampler are registered here as `flow` and `sampler`, None where the
            configuration does without.
        answerer: what to say, an `Answerer`; registered as `backbone`, the name in checkpoints.
        prompt, answer_template: templates with {question} and {answer}.
        train: parts that learn, of `parts.CAN_LEARN`; everything else is frozen and stays in eval mode.
        losses: of "lm" and "span"; "span" needs samples with a span, "lm" an answer.
        refinement: how pseudo spans are made in the training step; None = they come with the samples.
        mask_padding: False lets padded flows compete in the span loss, as published.
        frozen_dropout: True lets a language model that does not learn drop out in training, as published.
        generation: default arguments of `generate`.
    """

    PRETRAINED_MODEL_CONFIG_DICT: Mapping[str, str] = {}

    built_from: dict | None = None
    """The whole section `model` that `from_config` built it from."""

    def __init__(
        self,
        *,
        chooser: Chooser,
        answerer: nn.Module,
        prompt: str = "USER: <video>\n{question} ASSISTANT: ",
        answer_template: str = "{answer}</s>",
        train: Sequence[str] = ("qformer", "query_tokens", "projection"),
        losses: Sequence[str] = ("lm",),
        refinement: Refinement | None = None,
        mask_padding: bool = True,
        frozen_dropout: bool = False,
        generation: Mapping | None = None,
    ):
        super().__init__()
        self.chooser = chooser
        chooser.training = self.training
        self.flow = chooser.signal
        # RAFT stays in float32 and on each device: frozen, small, and wrong in bfloat16
        self.KEPT_WHOLE = ("flow.model",) if self.flow is not None else ()
        self.sampler = None if chooser.scorer is None else chooser.scorer.sampler
        self.backbone = answerer
        self.prompt = prompt
        self.answer_template = answer_template
        self.losses = tuple(losses)
        self.refinement = refinement
        self.mask_padding = mask_padding
        self.frozen_dropout = frozen_dropout
        self.generation = dict(generation or {})
        self.train_parts = tuple(train)
        self.loaded_parts: set[str] = set()
        check_settings(self)
        parts.freeze_all_but(self, self.train_parts)
        if self.sampler is not None:
            self.sampler.freeze_unused_layers(chooser.scorer.mode)
        parts.hold_learning_in_float32(self)

    @property
    def selector(self):
        """The chooser's rule."""
        return self.chooser.selector

    # ---- building ---------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, cfg) -> LSTP:
        """From a `model` section; `config/model.py` lists and explains every key."""
        cfg = complete(cfg)
        given = cfg["checkpoint"] or []
        checkpoints = [given] if isinstance(given, str) else given
        model = cls(**build_parts(cfg))
        model.built_from = cfg
        for path in checkpoints:
            model.load_checkpoint(path)
        return model

    @classmethod
    def from_pretrained(cls, model_type: str | os.PathLike) -> LSTP:
        """Builds a type of this model, as in LAVIS; or a model as it was trained, with its weights.

        Args:
            model_type: a type, whose weights are looked for by `models/weights/hub.py`; or a run's folder, one of its
                checkpoints, or owner/name of a repository that `push_to_hub` filled.

        Raises:
            ConfigError, WeightsError: nothing of that name, or it cannot be built; one line on why.
        """
        model_type = os.fspath(model_type)
        if model_type in cls.PRETRAINED_MODEL_CONFIG_DICT or ("/" not in model_type and not local_path(model_type)):
            return cls.from_config(cls.default_config(model_type).model)
        from lavis_lstp.config import complete_model

        checkpoint = as_checkpoint(model_type)
        section = recorded_model(checkpoint)
        variant = registry.get_model_class(section.get("arch"))
        if not (isinstance(variant, type) and issubclass(variant, LSTP)):
            raise WeightsError(f"{model_type}: has no manifest of an LSTP beside its weights; name them in a recipe")
        config = complete_model(OmegaConf.create({"model": section})).model
        config.checkpoint = [*section["checkpoint"], checkpoint]
        return variant.from_config(config)

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
            config.merge_with({"model": sizes_of_weights()})
        return config

    # ---- parts --------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> LSTP:
        """Frozen parts stay in eval mode, but for a language model with `frozen_dropout`."""
        super().train(mode)
        self.chooser.training = mode
        self.chooser.forget()  # weights may change between
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
        loaded = parts.load_parts_file(self, url_or_filename)
        self.loaded_parts.update(loaded)
        return loaded

    def own_state_dict(self) -> dict[str, Tensor]:
        """Weights and buffers of the parts that learn and of those that checkpoints brought: what no base model has.

        Raises:
            ConfigError: one of these parts is gone, as adapters are once they are merged.
        """
        prefixes, wanted = parts.prefixes_of(self), self.loaded_parts.union(self.train_parts)
        state = {key: value for key, value in self.state_dict().items() if parts.part_of(key, prefixes) in wanted}
        if gone := wanted - {parts.part_of(key, prefixes) for key in state}:
            raise ConfigError(f"the model has no {', '.join(sorted(gone))} any more; share the run's folder instead")
        return state

    def push_to_hub(self, repo_id: str, *, license: str, run: str | Path | None = None, **how) -> str:
        """Uploads `own_state_dict` with settings and a card; `from_pretrained(repo_id)` builds the model again.

        Args:
            repo_id, license, how: sampler_only, results, private and token; see `sharing.push_to_hub`.
            run: the run's folder, whose data, seed and numbers the card tells; None = it tells none.

        Returns:
            The address of the commit.
        """
        return push_to_hub(run, repo_id, license=license, model=self, **how)

    # ---- training ---------------------------------------------------------------------------------------------

    def forward(self, samples: Batch) -> dict[str, Tensor]:
        """Losses of a batch; videos, images and texts may be mixed.

        Returns:
            {"loss", "lm_loss", "span_loss"}: scalars; a loss that the config does not ask for is 0 and detached.
        """
        samples = readable(samples)
        zero = torch.zeros((), device=self.device)
        losses = {"lm_loss": zero, "span_loss": zero}
        logits = None
        if "span" in self.losses:
            logits = self.chooser.logits(samples, must_reach=self.losses == ("span",))
            targets, mask = self._target_spans(samples), self.chooser.flow_mask(samples)
            if self.chooser.has_own_flow(samples):
                counts = [m.sum(dim=1).to(targets.device) for m in (samples["frame_mask"], mask)]
                targets = torch.stack([spans_in_flows(span, *counts) for span in targets.unbind(1)], dim=1)
            losses["span_loss"] = span_loss(
                logits.start_logits,
                logits.end_logits,
                likeliest_span(logits.start_logits, logits.end_logits, targets.to(self.device)),
                mask.to(self.device),
                mask_padding=self.mask_padding,
                weight=samples.get("span_weight"),
            )
        if "lm" in self.losses:
            for row, text in enumerate(samples["text_output"]):
                if not text and is_hidden(samples, row):
                    name = samples["question_id"][row]
                    raise AnnotationError(f"question {name!r} has no answer to learn; train on a split with answers")
            choice = self.chooser(samples, logits=logits)
            answers = [self.answer_template.replace("{answer}", a) for a in samples["text_output"]]
            prompts, _ = self.prompts_with_subtitles(samples, choice.frame_index)
            losses["lm_loss"] = self.look(samples, choice.frame_index, prompts).loss(answers)
        return {"loss": losses["lm_loss"] + losses["span_loss"], **losses}

    def _target_spans(self, samples: Batch) -> Tensor:
        """The spans to learn one of, [B,M,2]: made here (self-refinement) or given; none for images and texts."""
        if self.refinement:
            spans = self.refinement.spans(self, samples)[:, None]
        elif "span" in samples:
            spans = samples["any_span"] if "any_span" in samples else samples["span"][:, None]
        else:
            raise ConfigError(
                "the span loss (model.losses) needs samples with 'span'; set datasets.<name>.spans, or "
                "model.refinement.in_loop=true"
            )
        return spans.where(moves(samples)[:, None, None].to(spans.device), spans.new_tensor(NO_SPAN))

    def prompts(self, samples: Batch, template: str | None = None) -> list[str]:
        """What the language model reads: the data's own prompt where it has one (a conversation), else the template.

        Args:
            template: replaces the config's and the data's, with {question} or, as in LAVIS, {}.
        """
        given = samples.get("prompt") if template is None else None
        template = (template or self.prompt).replace("{}", "{question}")
        made = [template.replace("{question}", q) for q in samples["text_input"]]
        return [own or general for own, general in zip(given, made, strict=True)] if given else made

    def prompts_with_subtitles(
        self, samples: Batch, frame_index: Tensor, template: str | None = None
    ) -> tuple[list[str], list[dict] | None]:
        """The prompts, with lines of the subtitles near the frames at `frame_index` [B,K] before the question.

        Returns:
            B strings, and of each the window_s (None = whole) and what `models.subtitles.shown_in` tells; None
            where the samples bring no subtitles.
        """
        prompts = self.prompts(samples, template)
        if "subtitles" not in samples:
            return prompts, None
        made = []
        for row, prompt in enumerate(prompts):
            index = [i for i in frame_index[row].tolist() if i >= 0]
            times_s = samples["frame_times"][row][index].tolist()
            lines = nearest_first(samples["subtitles"][row], times_s, samples["subtitles_window_s"][row])
            made.append(shown_in(prompt, samples["text_input"][row], lines, self.backbone))
        windows = (None if math.isinf(window) else window for window in samples["subtitles_window_s"])
        told = [{"window_s": window, **facts} for window, (_, facts) in zip(windows, made, strict=True)]
        return [prompt for prompt, _ in made], told

    def look(self, samples: Batch, frame_index: Tensor, prompts: list[str], rows: Tensor | None = None) -> Reading:
        """The prompts with the frames at `frame_index` [B,K], as the answerer reads them; rows: see `chosen_frames`."""
        frames, which, times_s = chosen_frames(samples, frame_index, rows)
        return self.backbone.look(frames.to(self.device), which, prompts, times_s)

    def _apply(self, *args, **kwargs) -> LSTP:
        self.chooser.forget()  # what it keeps lies where the weights were
        moved = super()._apply(*args, **kwargs)
        if self.chooser.frame_scorer is not None:
            self.chooser.frame_scorer.to(self.device)
        return moved

    # ---- answers ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def locate(self, samples: Batch) -> dict[str, Tensor]:
        """The span the sampler predicts and the frames the selector takes.

        Returns:
            span int64 [B,2], half-open; frame_index int64 [B,K], sorted; with selector.max_spans above 1 spans, of
            each sample a list of (start, end), the likeliest first; and, where the selector or the span loss
            uses the sampler, start_logits and end_logits float32 [B,T].
        """
        samples = readable(samples)
        logits = None
        if self.chooser.asks_sampler() or "span" in self.losses:
            logits = self.chooser.logits(samples)
        choice = self.chooser(samples, logits=logits)
        found = {"span": choice.span, "frame_index": choice.frame_index}
        if choice.spans is not None:
            found["spans"] = choice.spans
        if logits is not None:
            found["start_logits"] = logits.start_logits.float().cpu()
            found["end_logits"] = logits.end_logits.float().cpu()
        return found

    def answer(
        self,
        samples: Batch,
        prompt: str | None = None,
        *,
        selector: FrameSelector | None = None,
        flow: Tensor | None = None,
        given_up: GivenUp | None = None,
        **generation,
    ) -> dict:
        """Everything an answer is made of.

        Args:
            prompt: template to use instead of the config's.
            selector, flow: in place of the chooser's, see `Chooser`.
            given_up: rows that nobody waits for any more, see `Reading.answers`.
            generation: transformers' generation arguments, over those of the config.

        Returns:
            prediction, prompt (lists of B strings), log_prob (of the prediction's tokens: sum, mean and number), span
            [B,2], frame_index [B,K], num_filled [B] of a rule over scores, else None; spans, as `locate` gives them,
            where there may be several; num_shown [B] where the selector decides how many frames; subtitles,
            see `prompts_with_subtitles`; start_logits, end_logits, scores and num_scored where there are any, see
            `Choice`, flow [B,T,2,S,S] where it was needed, and seconds by stage (of the whole batch).
        """
        settings = generation_over(self.generation, generation)
        return answer(self, readable(samples), prompt, settings, given_up, selector=selector, flow=flow)

    def stream(
        self,
        samples: Batch,
        prompt: str | None = None,
        *,
        selector: FrameSelector | None = None,
        flow: Tensor | None = None,
        given_up: GivenUp | None = None,
        **generation,
    ) -> Iterator[list[str]]:
        """The answers as they are made, B new pieces of text at a time; arguments as for `answer`.

        The pieces of a row are its prediction, cut. The generator returns what `answer` gives; closing it ends the
        generation. `flow` is [B,T,2,h,w].
        """
        settings = generation_over(self.generation, generation)
        return stream(self, readable(samples), prompt, settings, given_up, selector=selector, flow=flow)

    def score_options(self, samples: Batch, prompt: str | None = None) -> dict:
        """How likely each of `samples["options"]` is as the answer.

        Returns:
            as `answer`, but in place of prediction and log_prob, for each row and each of its options, option_log_prob,
            and option_greedy: whether greedy search would give just this option.
        """
        return score_options(self, readable(samples), prompt)

    def generate(
        self,
        samples: Batch,
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
        samples: Batch,
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

    def pseudo_scores(self, samples: Batch, rows: int = ROWS) -> Tensor:
        """How well each frame alone answers the question, float32 [B,T] of 0..1; see `refinement.pseudo_scores`."""
        return pseudo_scores(self, readable(samples), self.generation, rows)

    @torch.no_grad()
    def label_scores(self, samples: Batch) -> Tensor:
        """The frame scorer's scores, float32 [B,T], of each video from 0 (its lowest) to 1 (its highest).

        Raises:
            ConfigError: the model has no frame scorer.
        """
        if self.chooser.frame_scorer is None:
            raise ConfigError(
                "labels by scores need a scorer of frames; set model.scorer.name, such as answerer, and "
                "model.selector.name to one that takes scores, such as topk"
            )
        mask = samples["frame_mask"].cpu().bool()
        scores = self.chooser.frame_scores(readable(samples))
        low = scores.masked_fill(~mask, math.inf).amin(dim=1, keepdim=True)
        high = scores.masked_fill(~mask, -math.inf).amax(dim=1, keepdim=True)
        return ((scores - low) / (high - low).clamp(min=1e-12)).where(mask, scores.new_zeros(()))


def register_models(names: Iterable[str] = tuple(MODEL_TYPES)) -> None:
    """Puts a name of LSTP for each entry of `MODEL_TYPES` into LAVIS's registry."""
    for name in names:
        types = {kind: str(path) for kind, path in MODEL_TYPES[name].items()}
        class_name = "".join(word.capitalize() for word in name.split("_"))
        variant = type(class_name, (LSTP,), {"PRETRAINED_MODEL_CONFIG_DICT": types, "__module__": __name__})
        registry.register_model(name)(variant)


register_models()
