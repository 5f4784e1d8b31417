"""Any video or image language model of transformers that has a processor and a chat template, as an answerer.

Models with a Q-Former (InstructBLIP, InstructBlipVideo, BLIP-2) have no chat template and are a `qformer.Backbone`.

In: frames, prompts and the frames' seconds. Out: a reading of them by the whole model, `AutoModelForImageTextToText`.
What a frame becomes (patches, crops, marks, times) is the business of the model's own `AutoProcessor`, which is given
the chosen frames as a video that needs no sampling, with their true seconds. Frames of a model that takes no video, a
single frame, and frames whose times nobody knows are given as images.

Each row goes through the processor alone, so that it does not depend on the others. Loss, answers and log-probabilities
share one form of input: prompts padded on the left, and positions that count from the first real token.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lavis_lstp.batch import several_ranks, weights_are_divided
from lavis_lstp.errors import ConfigError, WeightsError, unknown_name
from lavis_lstp.models.answer import qformer
from lavis_lstp.models.answer.answerer import refuse_marks, with_times
from lavis_lstp.models.answer.chat_reading import ChatReading, Rows
from lavis_lstp.models.answer.language import LanguageAnswerer
from lavis_lstp.models.answer.loading import (
    DTYPES,
    checked_attention,
    dtype_of,
    quantization_config,
)
from lavis_lstp.models.weights.hub import BROKEN_FOLDER, model_and_processor, where_from

logger = logging.getLogger(__name__)

QFORMERS = {"instructblip": "instructblip", "instructblipvideo": "instructblipvideo", "blip-2": "blip2"}
"""Model type of a checkpoint with a Q-Former -> family in `loading`."""
NEEDS = 5
"""Least major version of transformers: before it, processors differ in what they are told of a video."""
DYNAMIC_SIDE = 448
"""px, side of the frames of a model that takes any size; it is what data sets and `ask` resize them to."""
TOWERS, CONNECTORS, TEXTS = (
    ("visual", "vision_tower", "vision_model"),
    ("multi_modal_projector", "connector", "visual.merger", "visual.deepstack_merger_list", "image_newline"),
    ("language_model", "text_model"),
)
"""Names that transformers' classes give their vision tower, what joins it to the text, and the language model."""
BY_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Inputs [B,S] that go along with the tokens; all others are of the frames."""
PIXELS = "pixel_values"
"""Prefix of the names of inputs that the vision tower reads."""
NOT_INPUTS = ("second_per_grid_ts", "video_metadata", "num_crops")
"""Outputs of processors that positions are made of here, or that nobody reads."""


class VideoLLM(LanguageAnswerer):
    """A model that reads frames and text as a conversation.

    Args:
        model: transformers' model for image and text to text.
        processor: its processor, with a chat template.
        max_text_tokens: a prompt's own text, and an answer, are cut to this many tokens.
        times_in_prompt: writes the seconds of the frames in front of the prompt.

    Raises:
        ConfigError: the model has not the parts of such a model, or its processor no chat template.
    """

    def __init__(self, model: nn.Module, processor: Any, *, max_text_tokens: int = 512, times_in_prompt: bool = False):
        super().__init__(processor.tokenizer, max_text_tokens=max_text_tokens)
        self.model, self.processor = model, processor
        self.times_in_prompt = times_in_prompt
        core = getattr(model, "model", model)
        text = next((name for name in TEXTS if hasattr(core, name)), None)
        tower = next((name for name in TOWERS if hasattr(core, name)), None)
        if text is None or tower is None or not getattr(processor, "chat_template", None):
            raise ConfigError(
                f"{type(model).__name__} (model.backbone.weights) has no "
                f"{'vision tower' if tower is None else 'language model' if text is None else 'chat template'} that "
                "source transformers knows; take one with a chat template, or InstructBLIP, InstructBlipVideo or BLIP-2"
            )
        self._text_name = text
        joined = [name for name in CONNECTORS if _has(core, name)]
        self.PARTS = {
            "projection": tuple(f"model.model.{name}{'' if _is_weight(core, name) else '.'}" for name in joined),
            "vision": (f"model.model.{tower}.",),
            "language_model": (f"model.model.{text}.", "model.lm_head."),
        }
        self._marks = _marks(processor)
        self.of_frames = {
            getattr(model.config, name, None) for name in ("image_token_id", "video_token_id", "image_token_index")
        }
        self._takes_video = getattr(processor, "video_processor", None) is not None
        _warn_without_times(model, times_in_prompt or self.tells_times())

    @property
    def language_model(self) -> nn.Module:
        """The language model without its output layer."""
        return getattr(self.model.model, self._text_name)

    @property
    def writer(self) -> nn.Module:
        return self.model

    @property
    def image_size(self) -> int:
        size = (self.processor.video_processor if self._takes_video else self.processor.image_processor).size
        return (size or {}).get("height") or DYNAMIC_SIDE

    # ---- what the model is given ----------------------------------------------------------------------------------

    def look(self, frames: Tensor, which: Tensor, prompts: list[str], times_s: Tensor | None = None) -> ChatReading:
        """See `Answerer.look`: frames uint8 [U,3,H,W], which int64 [B,K], times_s [B,K].

        The vision tower runs with the language model, once for each question.

        Raises:
            ConfigError: a prompt contains a mark of the model's own.
        """
        which, frames = which.cpu(), frames.cpu()
        device = self.model.get_input_embeddings().weight.device
        made: list[tuple[int | None, dict[str, Tensor]]] = []
        for row, prompt in enumerate(prompts):
            real = which[row] >= 0
            seconds = None if times_s is None else times_s[row].cpu()[real].tolist()
            made.append((row, self._one(frames[which[row][real]], prompt, seconds)))
        made += self._for_other_ranks(made, frames)
        groups = _alike(made)
        if len(groups) > 1 and weights_are_divided(self):
            raise ConfigError(
                "questions of a batch are shown different numbers of frames, which this model cannot take at once, and "
                "its weights are divided among ranks (ZeRO-3); use ZeRO-2 (projects/lstp/deepspeed/zero2.json)"
            )
        return ChatReading(self, [self._joined(group, device) for group in groups], len(prompts))

    def _for_other_ranks(
        self, made: list[tuple[int | None, dict[str, Tensor]]], frames: Tensor
    ) -> list[tuple[None, dict[str, Tensor]]]:
        """Rows that count for nothing, so that the vision tower runs on this rank as often as on the others.

        A model runs it once for images and once for videos, where it is given these apart. With whole weights once is
        enough, for the parts that learn; with divided ones (ZeRO-3) the number must be the same.
        """
        if not several_ranks():
            return []
        divided, more = weights_are_divided(self), []
        there = {key for _, one in made for key in one if key.startswith(PIXELS)}
        blank = torch.zeros_like(frames[:1])
        for shown, times_s in ((blank, None), (blank.expand(2, -1, -1, -1), [0.0, 1.0])):
            if there and not divided:
                break
            one = self._one(shown, "", times_s)
            kinds = {key for key in one if key.startswith(PIXELS)}
            if not kinds <= there and (self._takes_video or times_s is None):
                more.append((None, one))
                there |= kinds
        return more

    def _one(self, frames: Tensor, prompt: str, times_s: Sequence[float] | None) -> dict[str, Tensor]:
        """The processor's output for one prompt with its frames, uint8 [K,3,H,W]."""
        as_video = self._takes_video and len(frames) > 1 and times_s is not None
        kinds = ["video"] if as_video else ["image"] * len(frames)
        said = self._cut(prompt)
        if self.times_in_prompt and len(frames):
            said = with_times(said, times_s)
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": said}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        begin = self.tokenizer.bos_token
        settings: dict[str, Any] = {
            "return_tensors": "pt",
            "add_special_tokens": not (begin and text.startswith(begin)),
        }
        if as_video:
            settings |= self._video(frames, times_s)
        elif kinds:
            settings["images"] = list(frames)
        made = dict(self.processor(text=[text], **settings))
        found = {key: value for key, value in made.items() if key not in NOT_INPUTS and torch.is_tensor(value)}
        found["positions"] = self._positions(found, times_s if as_video else None)
        return found

    def _video(self, frames: Tensor, times_s: Sequence[float]) -> dict[str, Any]:
        """Arguments that make chosen frames a video with true seconds.

        Processors compute seconds as number / fps. With fps = 1 the numbers are the file's own seconds, whatever its
        frame rate is, and whether or not it varies.
        """
        from transformers.video_utils import VideoMetadata

        metadata = VideoMetadata(
            total_num_frames=int(times_s[-1]) + 1, fps=1.0, frames_indices=list(times_s), duration=None
        )
        pinned = {}
        if hasattr(self.processor.video_processor, "cap_pixels_per_frame"):
            pinned["cap_pixels_per_frame"] = True  # as qwen-vl-utils does; the default of transformers is to change
        return {"videos": [frames], "video_metadata": [metadata], "do_sample_frames": False, **pinned}

    def _cut(self, prompt: str) -> str:
        refuse_marks(prompt, self._marks)
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return prompt if len(ids) <= self.max_text_tokens else self.tokenizer.decode(ids[: self.max_text_tokens])

    def _positions(self, made: Mapping[str, Tensor], times_s: Sequence[float] | None) -> Tensor:
        """int64 [1,S]; [4,1,S] in Qwen: place in the text, then time, height and width."""
        plain = torch.arange(made["input_ids"].shape[1])[None]
        core = self.model.model
        if not hasattr(core, "get_rope_index"):
            return plain
        taken = inspect.signature(core.get_rope_index).parameters
        if any(key in made for key in ("image_grid_thw", "video_grid_thw")):
            axes, _ = core.get_rope_index(**{key: value for key, value in made.items() if key in taken})
        else:
            axes = plain[None].expand(3, -1, -1).clone()
        rate = getattr(self.model.config.vision_config, "tokens_per_second", None)
        if rate and times_s is not None:
            step = self.processor.video_processor.temporal_patch_size
            axes = _at_true_times(axes, made["mm_token_type_ids"][0] == 2, list(times_s)[::step], rate)
        return torch.cat([plain[None], axes])

    def tells_times(self) -> bool:
        """Return whether what the model reads differs for frames of other seconds: some write them, some place them."""
        if not self._takes_video:
            return False
        side = self.image_size
        frames = torch.zeros(2, 3, side, side, dtype=torch.uint8)
        early, late = (self._one(frames, "", times_s) for times_s in ([0.0, 1.0], [90.0, 120.0]))
        return any(not torch.equal(early[key], late[key]) for key in ("input_ids", "positions"))

    def _joined(self, group: list[tuple[int | None, dict[str, Tensor]]], device: torch.device) -> Rows:
        longest = max(one["input_ids"].shape[1] for _, one in group)
        filling = {"input_ids": self._pad_id}

        def padded(value: Tensor, fill: int = 0) -> Tensor:
            return pad(value, (longest - value.shape[-1], 0), value=fill)

        keys = list(dict.fromkeys(key for _, one in group for key in one))
        tokens = {
            key: torch.cat([padded(one[key], filling.get(key, 0)) for _, one in group]).to(device)
            for key in keys
            if key in BY_TOKEN
        }
        positions = torch.cat([padded(one["positions"]) for _, one in group], dim=-2).to(device)
        frames = {}
        for key in keys:
            if key not in BY_TOKEN and key != "positions":
                value = torch.cat([one[key] for _, one in group if key in one]).to(device)
                frames[key] = value.to(dtype_of(self.model.model)) if value.is_floating_point() else value
        return Rows([row for row, _ in group], tokens, positions, frames)

    # ---- what the model says --------------------------------------------------------------------------------------

    def forward_model(self, tokens: Mapping[str, Tensor], positions: Tensor, **inputs: Any) -> Any:
        """The model's output for tokens [R,P] at positions int64 [R,P] or [4,R,P]; see `chat_reading.Rows`."""
        with self._one_precision(positions.device.type):
            return self.model(**tokens, position_ids=positions, **inputs)

    def _one_precision(self, device: str) -> AbstractContextManager:
        """Return a context that computes in the frozen part's lower precision where what learns is float32."""
        kinds = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        low = next((kind for kind in kinds if kind != torch.float32), None)
        mixed = low is not None and len(kinds) > 1 and not torch.is_autocast_enabled(device)
        return torch.autocast(device, dtype=low) if mixed else nullcontext()

    @torch.no_grad()
    def generate_group(self, group: Rows, wanted: Mapping[str, Any]) -> Any:
        """See the argument `generate` of `LanguageAnswerer.write`."""
        length = group.positions.shape[-1]
        with torch.compiler.set_stance("force_eager"), self._one_precision(group.positions.device.type):
            made = self.model.generate(
                **group.tokens,
                **group.frames,
                position_ids=group.positions,
                pad_token_id=self._pad_id,
                eos_token_id=self._end_ids,
                **_of_answers(wanted, length),
            )
        if torch.is_tensor(made):
            return made[:, length:]
        made.sequences = made.sequences[:, length:]
        return made

    # ---- adapters, weights ----------------------------------------------------------------------------------------

    def _set_language_model(self, language_model: nn.Module) -> None:
        setattr(self.model.model, self._text_name, language_model)


# ---- parts of the above ---------------------------------------------------------------------------------------------


def _alike(made: list[tuple[int | None, dict[str, Tensor]]]) -> list[list[tuple[int | None, dict[str, Tensor]]]]:
    """Rows whose frames can be laid end to end: images beside videos, but not videos of other lengths where their
    frames have an axis of their own. Rows without frames go with the first group."""
    groups: list[tuple[dict[str, tuple], list]] = []
    texts = []
    for row, one in made:
        shapes = {k: tuple(v.shape[1:]) for k, v in one.items() if k not in BY_TOKEN and k != "positions"}
        if not shapes:
            texts.append((row, one))
            continue
        fitting = (group for group in groups if all(group[0].get(k, shape) == shape for k, shape in shapes.items()))
        known, rows = next(fitting, None) or ({}, [])
        if not rows:
            groups.append((known, rows))
        known.update(shapes)
        rows.append((row, one))
    found = [rows for _, rows in groups]
    return [[*texts, *found[0]], *found[1:]] if found else [texts]


def _at_true_times(axes: Tensor, of_video: Tensor, times_s: Sequence[float], rate: float) -> Tensor:
    """Qwen2.5-VL's positions with each pair of frames at the seconds of its first one, from the start of the video.

    transformers takes frames for evenly spaced ones that begin at 0. What follows goes on behind the farthest axis, as
    in Qwen's own code.

    Args:
        axes: int64 [3,1,S]; of_video: bool [S]; rate: positions a second.
    """
    axes, where = axes.clone(), of_video.nonzero()[:, 0]
    begin = axes[1, 0, where].min()
    steps = torch.tensor([int(t * rate) for t in times_s])
    axes[0, 0, where] = begin + steps.repeat_interleave(len(where) // len(steps))
    after = int(where[-1]) + 1
    if after < axes.shape[-1]:
        axes[:, 0, after:] += axes[:, 0, where].max() + 1 - axes[0, 0, after]
    return axes


class _BehindPrompt:
    """A logits processor of transformers that sees the answer alone, not the prompt and its padding."""

    def __init__(self, processor: Any, length: int):
        self.processor, self.length = processor, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.processor(input_ids[:, self.length :], scores)


def _of_answers(wanted: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Arguments of `generate` for prompts that are tokens, so that settings follow the answer's tokens alone.

    Args:
        length: of the padded prompts.
    """
    import transformers

    wanted = dict(wanted)
    made = list(wanted.pop("logits_processor", ()))
    if count := wanted.pop("no_repeat_ngram_size", None):
        made.append(transformers.NoRepeatNGramLogitsProcessor(count))
    if words := wanted.pop("bad_words_ids", None):
        made.append(transformers.NoBadWordsLogitsProcessor(words))
    if bias := wanted.pop("sequence_bias", None):
        made.append(transformers.SequenceBiasLogitsProcessor(bias))
    # an own generation config of the checkpoint must not put them back
    wanted |= {"no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None}
    wanted["logits_processor"] = transformers.LogitsProcessorList([_BehindPrompt(p, length) for p in made])
    return wanted


def _has(module: nn.Module, name: str) -> bool:
    for word in name.split("."):
        if getattr(module, word, None) is None:
            return False
        module = getattr(module, word)
    return True


def _is_weight(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name.split(".")[0]), Tensor)


def _marks(processor: Any) -> list[str]:
    """Marks that a prompt may not contain: they begin turns, end them, or stand for frames."""
    tokenizer = processor.tokenizer
    named = [getattr(processor, name, None) for name in ("image_token", "video_token", "boi_token")]
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [mark for mark in dict.fromkeys([*named, *added]) if isinstance(mark, str) and mark.strip()]


def _warn_without_times(model: nn.Module, told: bool) -> None:
    if not told:
        logger.warning(
            "%s is not told when its frames were taken; model.backbone.times_in_prompt writes it to the prompt",
            type(model).__name__,
        )


def _qformer_family(weights: str) -> str | None:
    """Return the family of a checkpoint with a Q-Former by its config.json; of one that cannot be read none."""
    from transformers import PretrainedConfig

    try:
        return QFORMERS.get(PretrainedConfig.get_config_dict(**where_from(weights))[0].get("model_type"))
    except BROKEN_FOLDER:
        return None  # who loads it says what is wrong


def build(
    *,
    weights: str | None = None,
    dtype: str = "bfloat16",
    attention: str | None = None,
    quantization: str | None = None,
    max_text_tokens: int = 512,
    times_in_prompt: bool = False,
) -> LanguageAnswerer:
    """Source `transformers`: a model of AutoModelForImageTextToText with its processor, from a folder or the hub.

    One with a Q-Former reads the plain prompt behind the tokens of all frames, as InstructBlipVideo's processor does.

    Args:
        weights: hub id or folder.
        dtype: of what does not learn.
        attention: transformers' attention implementation; None = its own choice.
        quantization: 8bit or 4bit, of the language model.
        times_in_prompt: see `VideoLLM`.

    Raises:
        WeightsError: weights, tokenizer or processor are missing, damaged or of other shapes.
        ConfigError: a setting is not known, or this machine cannot follow it.
    """
    import transformers

    if dtype not in DTYPES:
        raise ConfigError(unknown_name("dtype (model.backbone.dtype)", dtype, DTYPES))
    if not weights:
        raise WeightsError("model.backbone.weights is empty: expected a hub id or a folder, for source transformers")
    if family := _qformer_family(weights):
        common = {"dtype": dtype, "attention": attention, "quantization": quantization}
        made = qformer.build(family, weights=weights, max_text_tokens=max_text_tokens, fusion="concat", **common)
        known = made.tokenizer.get_added_vocab()
        made.marks, made.times_in_prompt = [mark for mark in ("<image>", "<video>") if mark in known], times_in_prompt
        _warn_without_times(made.model, times_in_prompt)
        return made
    if int(transformers.__version__.split(".")[0]) < NEEDS:
        raise ConfigError(
            f"model.backbone.source transformers needs transformers {NEEDS} or newer, this is "
            f"{transformers.__version__}; pip install -U transformers"
        )
    settings: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attention := checked_attention(attention):
        settings["attn_implementation"] = attention
    if quantization:
        # transformers compares names from their beginning
        whole = [f"{before}{name}" for before in ("", "model.") for name in (*TOWERS, *CONNECTORS)]
        settings["quantization_config"] = quantization_config(quantization, dtype, skipped=whole)
    auto, key = transformers.AutoModelForImageTextToText, "model.backbone.weights"
    model, processor = model_and_processor(auto, weights, key, "video language model", **settings)
    return VideoLLM(model, processor, max_text_tokens=max_text_tokens, times_in_prompt=times_in_prompt)
