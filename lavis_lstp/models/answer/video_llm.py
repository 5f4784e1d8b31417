"""Any video or image language model of transformers that has a processor and a chat template, as an answerer.

In: frames, prompts and the frames' seconds. Out: a reading of them by the whole model, `AutoModelForImageTextToText`.
What a frame becomes (patches, crops, marks, times) is the business of the model's own `AutoProcessor`, which is given
the chosen frames as a video that needs no sampling, with their true seconds. Frames of a model that takes no video, a
single frame, and frames whose times nobody knows are given as images.

Each row goes through the processor alone, so that it does not depend on the others. Loss, answers and log-probabilities
share one form of input: prompts padded on the left, and positions that count from the first real token.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from lavis_lstp.batch import several_ranks, weights_are_divided
from lavis_lstp.errors import ConfigError, WeightsError, unknown_name
from lavis_lstp.models.answer.answerer import Answers
from lavis_lstp.models.answer.language import IGNORED, LanguageAnswerer, refuse_beams, stream_of
from lavis_lstp.models.answer.loading import (
    DTYPES,
    checked_attention,
    dtype_of,
    quantization_config,
    untie_as_in,
)
from lavis_lstp.models.answer.lora import matched
from lavis_lstp.models.weights.hub import where_from, where_to_put

logger = logging.getLogger(__name__)

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
"""How the names of inputs begin that the vision tower reads."""
NOT_INPUTS = ("second_per_grid_ts", "video_metadata", "num_crops")
"""Outputs of processors that positions are made of here, or that nobody reads."""
TIMES = "The frames show these seconds of the video: {}.\n"
"""Put before the prompt by `model.backbone.times_in_prompt`."""


class Rows(NamedTuple):
    """Prompts that go through the model together.

    rows: their places in the batch; a last one of None counts for nothing. tokens: name -> [R,P], padded on the left.
    positions: int64 [R,P], or [4,R,P] where the model has several axes of them. frames: all other inputs.
    """

    rows: list[int | None]
    tokens: dict[str, Tensor]
    positions: Tensor
    frames: dict[str, Tensor]


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
                "source transformers knows; for InstructBLIP and BLIP-2 use model.backbone.source: hub"
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
        if not (times_in_prompt or self.tells_times()):
            logger.warning(
                "%s is not told when its frames were taken; model.backbone.times_in_prompt writes it to the prompt",
                type(model).__name__,
            )

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
        """See `Answerer.look`. The vision tower runs with the language model, once for each question.

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
        if self.times_in_prompt and times_s and len(frames):
            said = TIMES.format(", ".join(f"{t:.1f}" for t in times_s)) + said
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
        for mark in self._marks:
            if mark in prompt:
                raise ConfigError(
                    f"the prompt {prompt[:80]!r} contains {mark!r}, a mark of the model's own; questions may not, and "
                    "model.prompt needs none with source transformers: set it to '{question}'"
                )
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
        """Whether what the model reads differs for frames of other seconds: some write them, some place them."""
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
        """The model's output."""
        with self._one_precision(positions.device.type):
            return self.model(**tokens, position_ids=positions, **inputs)

    def _one_precision(self, device: str) -> AbstractContextManager:
        """Where what learns is float32 and the rest is not, computes in what the rest is."""
        kinds = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        low = next((kind for kind in kinds if kind != torch.float32), None)
        mixed = low is not None and len(kinds) > 1 and not torch.is_autocast_enabled(device)
        return torch.autocast(device, dtype=low) if mixed else nullcontext()

    def written(
        self,
        group: Rows,
        *,
        generators: Sequence[torch.Generator] | None,
        scored: bool,
        watched_by: Mapping[str, object] | None,
        **settings: Any,
    ) -> Answers:
        """An answer to each prompt of a group."""
        return self._written(
            lambda wanted: self._generate_group(group, wanted),
            len(group.rows),
            generators,
            scored,
            watched_by,
            settings,
        )

    @torch.no_grad()
    def _generate_group(self, group: Rows, wanted: Mapping[str, Any]) -> Any:
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

    def matched(self, state_dict: Mapping[str, Tensor], source: str, before: str = "") -> dict[str, Tensor]:
        """See `LanguageAnswerer.matched`."""
        prefixes = [before + prefix for prefix in self.PARTS["language_model"]]
        state_dict = matched(state_dict, [before + key for key in self.state_dict()], prefixes, source)
        inner = {key.removeprefix(before): value for key, value in state_dict.items() if key.startswith(before)}
        untie_as_in(self, inner, self.model)
        return state_dict


class ChatReading:
    """A `Reading` by a `VideoLLM`, in groups of rows that fit into one call.

    Args:
        groups: every row of the batch is in one of them.
        rows: their number.
    """

    def __init__(self, answerer: VideoLLM, groups: list[Rows], rows: int):
        self.answerer, self.groups, self.rows = answerer, groups, rows
        self._read: dict[int, tuple[Any, Tensor]] = {}

    def loss(self, answers: list[str]) -> Tensor:
        total, count = 0, 0
        for group in self.groups:
            sums, labels = self._loss(group, [answers[row] if row is not None else "" for row in group.rows])
            total, count = total + sums, count + int((labels != IGNORED).sum())
        return total / max(1, count)

    def _loss(self, group: Rows, answers: list[str]) -> tuple[Tensor, Tensor]:
        """Sum of the cross entropy of the answers' tokens, and their labels; padding stands behind, not in front."""
        more, labels = self._behind(group, answers)
        tokens = {key: torch.cat([value, more[key]], 1) for key, value in group.tokens.items()}
        positions = torch.cat([group.positions, self._next(group.positions, labels.shape[1])], -1)
        labels = torch.cat([labels.new_full(group.tokens["input_ids"].shape, IGNORED), labels], 1)
        order = torch.argsort(tokens["attention_mask"], dim=1, stable=True, descending=True)
        tokens = {key: value.gather(1, order) for key, value in tokens.items()}
        positions = positions.gather(-1, order.expand(positions.shape))
        labels = labels.gather(1, order)[:, 1:]
        kept = (labels != IGNORED).any(0).nonzero()[:, 0]
        if not len(kept):
            kept = labels.new_zeros(1)
        logits = self.answerer.forward_model(
            tokens, positions, **group.frames, use_cache=False, logits_to_keep=kept
        ).logits
        labels = labels[:, kept]
        counted = labels != IGNORED
        nothing = 0 * logits[~counted].sum() if group.rows[-1] is None or not counted.any() else 0
        return cross_entropy(logits[counted].float(), labels[counted], reduction="sum") + nothing, labels

    def answers(
        self, *, generators: Sequence[torch.Generator] | None = None, scored: bool = True, **generation: Any
    ) -> Answers:
        return self._together(
            [self._answers(group, generators, scored, None, generation) for group in self.groups], scored
        )

    def _answers(
        self,
        group: Rows,
        generators: Sequence[torch.Generator] | None,
        scored: bool,
        watched_by: Mapping[str, object] | None,
        generation: Mapping[str, Any],
    ) -> Answers:
        spare = torch.Generator().manual_seed(0)
        drawn = None if generators is None else [spare if row is None else generators[row] for row in group.rows]
        return self.answerer.written(group, generators=drawn, scored=scored, watched_by=watched_by, **generation)

    def _together(self, made: list[Answers], scored: bool) -> Answers:
        texts = [""] * self.rows
        sums, counts = torch.zeros(self.rows), torch.zeros(self.rows, dtype=torch.long)
        for group, answers in zip(self.groups, made, strict=True):
            for i, row in enumerate(group.rows):
                if row is None:
                    continue
                texts[row] = answers.texts[i]
                if scored:
                    sums[row], counts[row] = answers.log_probs[i], answers.counts[i]
        return Answers(texts, sums if scored else None, counts if scored else None)

    def stream(self, *, generators: Sequence[torch.Generator] | None = None, **generation: Any) -> Iterator[list[str]]:
        refuse_beams(generation)
        made = []
        for group in self.groups:
            pieces = stream_of(
                self.answerer,
                len(group.rows),
                lambda watched, group=group: self._answers(group, generators, True, watched, generation),
            )
            made.append((yield from self._spread(group, pieces)))
        return self._together(made, True)

    def _spread(self, group: Rows, pieces: Iterator[list[str]]) -> Iterator[list[str]]:
        """Pieces of a group's rows as pieces of all rows."""
        try:
            while True:
                try:
                    new = next(pieces)
                except StopIteration as end:
                    return end.value
                spread = [""] * self.rows
                for row, piece in zip(group.rows, new, strict=True):
                    if row is not None:
                        spread[row] = piece
                if any(spread):
                    yield spread
        finally:
            pieces.close()

    @torch.no_grad()
    def log_probs(self, rows: list[int], answers: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        sums, counts = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.long)
        greedy = torch.ones(len(rows), dtype=torch.bool)
        for number, group in enumerate(self.groups):
            places = [i for i, row in enumerate(rows) if row in group.rows]
            if not places:
                continue
            within = torch.tensor([group.rows.index(rows[i]) for i in places], device=group.positions.device)
            logits, labels = self._logits(number, within, [answers[i] for i in places])
            counted = labels != IGNORED
            found = logits.new_zeros(labels.shape, dtype=torch.float32)
            found[counted] = -cross_entropy(logits[counted].float(), labels[counted], reduction="none")
            at = torch.tensor(places)
            sums[at], counts[at] = found.sum(1).cpu(), counted.sum(1).cpu()
            greedy[at] = ((logits.argmax(-1) == labels) | ~counted).all(1).cpu()
        return sums, counts, greedy

    def _logits(self, number: int, rows: Tensor, answers: list[str]) -> tuple[Tensor, Tensor]:
        """Logits [M,A,V] and labels [M,A] of answers to rows of a group, whose prompts are read once."""
        group = self.groups[number]
        if number not in self._read:
            read = self.answerer.forward_model(
                group.tokens, group.positions, **group.frames, use_cache=True, logits_to_keep=1
            )
            self._read[number] = read.past_key_values, read.logits[:, -1]
        cache, first = self._read[number]
        more, labels = self._behind(group, answers)
        own = copy.deepcopy(cache)
        own.batch_select_indices(rows)
        tokens = {key: value for key, value in more.items() if key != "attention_mask"}
        tokens["attention_mask"] = torch.cat([group.tokens["attention_mask"][rows], more["attention_mask"]], 1)
        positions = self._next(group.positions[..., rows, :], labels.shape[1])
        logits = self.answerer.forward_model(tokens, positions, past_key_values=own, use_cache=True).logits
        return torch.cat([first[rows, None], logits[:, :-1]], dim=1), labels

    def _behind(self, group: Rows, answers: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        """What stands behind prompts: inputs by token [M,A], and labels [M,A]."""
        told = self.answerer.answer_ids(answers)
        for answer, ids in zip(answers, told, strict=True):
            if self.answerer.of_frames.intersection(ids):
                raise ConfigError(f"the answer {answer[:80]!r} contains a mark that stands for frames; answers may not")
        width = max(1, *map(len, told)) if told else 1
        device = group.positions.device
        labels = torch.tensor([ids + [IGNORED] * (width - len(ids)) for ids in told], device=device)
        real = (labels != IGNORED).long()
        made = {key: torch.zeros_like(real) for key in group.tokens}
        made["attention_mask"] = real
        made["input_ids"] = labels.where(real.bool(), labels.new_full((), self.answerer._pad_id))
        return made, labels

    @staticmethod
    def _next(positions: Tensor, count: int) -> Tensor:
        """Positions of `count` tokens behind those at hand; as in transformers, behind the farthest of all axes."""
        last = positions[..., -1:]
        return last + 1 + torch.arange(count, device=positions.device)


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


def build(
    *,
    weights: str | None = None,
    dtype: str = "bfloat16",
    attention: str | None = None,
    quantization: str | None = None,
    max_text_tokens: int = 512,
    times_in_prompt: bool = False,
) -> VideoLLM:
    """Source `transformers`: a model of AutoModelForImageTextToText with its processor, from a folder or the hub.

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
    if int(transformers.__version__.split(".")[0]) < NEEDS:
        raise ConfigError(
            f"model.backbone.source transformers needs transformers {NEEDS} or newer, this is "
            f"{transformers.__version__}; pip install -U transformers"
        )
    if not weights:
        raise WeightsError("model.backbone.weights is empty: expected a hub id or a folder, for source transformers")
    settings: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attention := checked_attention(attention):
        settings["attn_implementation"] = attention
    if quantization:
        settings["quantization_config"] = quantization_config(quantization, dtype, skipped=(*TOWERS, *CONNECTORS))
    model, processor = _loaded(weights, settings)
    return VideoLLM(model, processor, max_text_tokens=max_text_tokens, times_in_prompt=times_in_prompt)


def _loaded(weights: str, settings: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    where = where_from(weights)
    try:
        processor = AutoProcessor.from_pretrained(**where)
        model, found = AutoModelForImageTextToText.from_pretrained(**where, output_loading_info=True, **settings)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, KeyError) as error:
        raise WeightsError(
            f"no video language model at '{weights}' (model.backbone.weights): expected a hub id that is cached or can "
            "be reached, such as Qwen/Qwen3-VL-8B-Instruct, or a folder with its files (config.json, *.safetensors, "
            f"tokenizer and processor files) downloaded from huggingface.co; {where_to_put(weights)}; "
            f"transformers says: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise WeightsError(f"'{weights}' (model.backbone.weights) lacks {len(missing)} weights, first {missing[0]}")
    return model, processor
