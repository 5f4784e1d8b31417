"""Settings of one answer, over those of the model: which frames, and how the answer is generated.

In: what a caller writes. Out: `Settings`, checked; two questions with equal settings can be answered in one batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lavis_lstp.config.data import VideoQA
from lavis_lstp.config.fields import SEED, check_generation, checked, generation_over, key
from lavis_lstp.config.model import SELECTORS, Generation
from lavis_lstp.errors import ConfigError

GENERATION = (
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "num_beams", "max_new_tokens"),
    *("min_new_tokens", "length_penalty", "repetition_penalty", "no_repeat_ngram_size"),
)
"""Generation arguments that a call may set: single numbers, which can be checked before the model runs."""
MOST_FRAMES, MOST_SELECTED, MOST_TOKENS, MOST_BEAMS = 4096, 256, 4096, 32
"""Beyond these a number is taken for a mistake: T, K, tokens of an answer, beams."""


@dataclass
class OwnSettings:
    """Settings that are not transformers'."""

    num_frames: int | None = key(None, least=1, most=MOST_FRAMES)  # T, evenly spaced candidates of the video
    fps: int | float | None = key(None, above=0, most=1000)  # candidates a second where these are at most T; null = T
    # K, frames shown to the language model; auto: as many as the scores ask for, within the model's bounds
    num_selected: int | str | None = key(None, least=1, most=MOST_SELECTED, word="auto")
    selector: str | None = key()  # of config/model.py
    rule: dict[str, Any] | None = key()  # settings of a selector over scores, such as {"power": 2.0}
    seed: int | None = key(None, least=0, most=SEED)  # of tokens and frames that are drawn
    frames: str | None = key(None, one_of=("exact", "keyframe"))  # keyframe: nearest key frames, several times faster
    flow_pairs: str | None = key(None, one_of=("sampled", "local"))  # local: flow to the next picture of the file
    # of the subtitles that a question brings, lines so many seconds from a shown frame; whole: all lines
    subtitles_window_s: int | float | str | None = key(None, least=0, word="whole")


OWN = tuple(OwnSettings.__dataclass_fields__)


@dataclass(frozen=True)
class Settings:
    """Settings under which one question is answered.

    Attributes:
        num_frames: T, at most.
        fps: None = T of any video, else so many frames a second, where these are at most T.
        selector: the rule that chooses K frames.
        seed: of drawing.
        generation: transformers' arguments over those of the model.
        reading: frames and flow_pairs, how candidates are read where not as the reader does.
        subtitles_window_s: lines of subtitles so near a shown frame are read; infinity = all.
    """

    num_frames: int
    selector: Any
    seed: int
    generation: dict[str, Any] = field(default_factory=dict)
    fps: float | None = None
    reading: dict[str, str] = field(default_factory=dict)
    subtitles_window_s: float = 2.0

    @property
    def batch_key(self) -> str:
        """Equal where two questions may be answered in one batch."""
        rule = sorted((name, str(value)) for name, value in vars(self.selector).items())
        return json.dumps([rule, self.generation], sort_keys=True)


def settings_of(model: Any, num_frames: int, given: Mapping[str, Any]) -> Settings:
    """See `Predictor.settings`.

    Args:
        num_frames: T where `given` does not say.

    Raises:
        ConfigError: a setting is not known, or cannot be used.
    """
    from lavis_lstp.models.answer.generation import checked as checked_generation

    unknown = [name for name in given if name not in (*OWN, *GENERATION)]
    if unknown:
        checked({unknown[0]: None}, OwnSettings, "settings", GENERATION)  # raises, with the nearest name
    own = checked({name: value for name, value in given.items() if name in OWN}, OwnSettings, "settings")
    own = {name: value for name, value in own.items() if value is not None}
    wanted = {name: value for name, value in given.items() if name in GENERATION and value is not None}
    generation = checked(wanted, Generation, "settings")
    for name, most in (("max_new_tokens", MOST_TOKENS), ("min_new_tokens", MOST_TOKENS), ("num_beams", MOST_BEAMS)):
        if generation.get(name, 0) > most:
            raise ConfigError(f"settings.{name} must be at most {most}, got {generation[name]}")
    together = generation_over(model.generation, generation)
    check_generation(together, "settings")
    checked_generation(together, encoder_decoder=model.backbone.is_encoder_decoder)
    frames = own.get("num_frames", num_frames)
    selector = _selector(model.selector, own)
    if model.chooser.asks_sampler(selector) and model.sampler is None:
        raise ConfigError(
            f"settings.selector: '{selector.name}' asks the temporal sampler, and this model was loaded without one; "
            f"load it with the option model.selector.name={selector.name}"
        )
    if selector.needs_features and not model.chooser.has_features:
        raise ConfigError(
            f"settings.selector: '{selector.name}' compares features of frames, and neither this model's scorer nor "
            "its answerer has some; load it with an option such as model.scorer.name=clip"
        )
    places = getattr(model.sampler, "max_positions", None)
    windows = getattr(model.chooser.scorer, "window", None)
    if model.chooser.asks_sampler(selector) and places is not None and windows is None and frames + 2 > places:
        raise ConfigError(
            f"settings.num_frames must be at most {places - 2} for this model's sampler, got {frames}; load it "
            "with the option model.sampler.window=N, the frames that it was trained on, for more"
        )
    how = {name: own[name] for name in ("frames", "flow_pairs") if name in own}
    window = own.get("subtitles_window_s", VideoQA.subtitles_window_s)
    window = math.inf if window == "whole" else float(window)
    return Settings(frames, selector, own.get("seed", model.chooser.seed), generation, own.get("fps"), how, window)


def _selector(used: Any, own: Mapping[str, Any]) -> Any:
    """The model's selector, or one like it with another rule or another K."""
    from lavis_lstp.models.where.frame_selector import build_selector

    if not {"selector", "num_selected", "rule"} & own.keys():
        return used
    kept = ("span_key", "context", "few_frames", "grid", "mapping", "marks", "mask_padding")
    kept += ("least_selected", "most_selected", "mass")
    several = used.max_spans if own.get("selector", used.name) in ("best_span", "lstp") else 1
    kept_rule = used.settings if own.get("selector", used.name) == used.name else None
    made = build_selector(
        own.get("selector", used.name),
        num_selected=own.get("num_selected", used.num_selected),
        **{name: getattr(used, name) for name in kept},
        settings=own.get("rule", kept_rule),
        max_spans=several,
    )
    if made.by_data:
        what = ", ".join(SELECTORS[made.name].needs)
        raise ConfigError(
            f"selector '{made.name}' takes its {what} from a data set, and a question alone has none; use lstp"
        )
    return made
