"""The section `model`: every key, its type, its default, its range and its meaning.

A YAML file of configs/models holds what differs. A section of transformers' own keys (`backbone.config`, `generation`)
is open: transformers says which keys there are, and those listed here have a range or a form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from lavis_lstp.config.fields import SEED, TEXTS, check_generation, checked, key
from lavis_lstp.errors import ConfigError

PARTS = ("sampler", "vision", "qformer", "query_tokens", "projection", "language_model", "lora")
SOURCES: dict[str, str] = {
    "hub": "lavis_lstp.models.answer.qformer:build",
    "lavis": "lavis_lstp.models.answer.lavis_models:build_lavis_backbone",
    "transformers": "lavis_lstp.models.answer.video_llm:build",
    "endpoint": "lavis_lstp.models.answer.endpoint:build",
}
"""`backbone.source` -> the function that builds such an answerer; a new one is a file and a line here."""


FIGURES = ("bit_cost", "motion_energy")
"""The codec says these of each frame; a data set brings them where its keys of these names are true, and a question
alone brings those that its selector needs."""


SEE_FRAMES = ("hub", "lavis")
"""Sources whose answerers look at each frame by itself, so that rules that compare frames can take its features."""


class Kind(NamedTuple):
    """A selector: the function (of models/where) that is its rule, and what the rule must be told of a video.

    needs: of "logits" of the temporal sampler; "scores", one a frame, by `model.scorer`; "times_s" of the frames; the
    "question"; a "span", a "record" of frames chosen before or one of `FIGURES` of the frames, all of which come with
    the sample; "rng", random numbers; "features" of the frames, of a scorer that looks at single frames or of the
    answerer. A rule over scores or costs is one of selectors.py.
    """

    rule: str
    needs: tuple[str, ...] = ()

    @property
    def by_sampler(self) -> bool:
        """Return whether the temporal sampler, or a scorer in its place, must be asked first."""
        return not {"logits", "scores"}.isdisjoint(self.needs)

    @property
    def by_data(self) -> bool:
        """Return whether a data set must bring something, so that a question alone is not enough."""
        return not {"span", "record"}.isdisjoint(self.needs)


_OF_LOGITS, _OF_SCORES = "lavis_lstp.models.where.frame_selector", "lavis_lstp.models.where.selectors"
SELECTORS: dict[str, Kind] = {
    "best_span": Kind(f"{_OF_LOGITS}:best", needs=("logits",)),
    "lstp": Kind(f"{_OF_LOGITS}:best", needs=("logits",)),
    "argmax": Kind(f"{_OF_LOGITS}:argmax", needs=("logits",)),
    "gumbel": Kind(f"{_OF_LOGITS}:gumbel", needs=("logits", "rng")),
    "uniform": Kind(f"{_OF_LOGITS}:uniform"),
    "random": Kind(f"{_OF_LOGITS}:random", needs=("rng",)),
    "topk": Kind(f"{_OF_SCORES}:topk", needs=("scores",)),
    "aks": Kind(f"{_OF_SCORES}:aks", needs=("scores",)),
    "inverse_transform": Kind(f"{_OF_SCORES}:inverse_transform", needs=("scores",)),
    "focus": Kind(f"{_OF_SCORES}:focus", needs=("scores", "times_s", "rng")),
    "global_local": Kind(f"{_OF_SCORES}:global_local", needs=("scores", "question")),
    "mmr": Kind(f"{_OF_SCORES}:mmr", needs=("scores", "features")),
    "dpp": Kind(f"{_OF_SCORES}:dpp", needs=("scores", "features")),
    "bitcost": Kind(f"{_OF_SCORES}:inverse_transform", needs=("bit_cost",)),
    "motion": Kind(f"{_OF_SCORES}:inverse_transform", needs=("motion_energy",)),
    "given": Kind(f"{_OF_LOGITS}:given", needs=("span",)),
    "recorded": Kind(f"{_OF_LOGITS}:recorded", needs=("record",)),
}
"""`selector.name` -> its rule. best_span (also called lstp): the most likely span. argmax: likeliest start and
likeliest end, each for itself, under the published rules. gumbel: published, two noisy candidates. uniform: K interval
centres of the video. random: K different frames. topk, aks, inverse_transform, focus, global_local: published rules
over scores, see selectors.py. mmr, dpp: scores against likeness of the frames, by the scorer's
features or the answerer's. given: a span that comes with the sample
(a pseudo span, or the gold span as oracle). bitcost: inverse_transform over what the encoder spent on each part of the
video, which `datasets.<name>.bit_cost: true` brings; motion: over how much moves there, by `motion_energy: true`.
recorded: all frames that a data set with a `selection` brings."""

AUTO = "auto"
"""A `selector.num_selected` that depends on the scores of each question."""


class ScorerKind(NamedTuple):
    """build: function or class (of models/where/scorers.py) that builds it; weights: hub id that it takes where the
    configuration names none; by_frame: whether it looks at frames, each by itself, and so has features of them."""

    build: str
    weights: str | None = None
    by_frame: bool = True


_SCORERS = "lavis_lstp.models.where.scorers"
SCORERS: dict[str, ScorerKind] = {
    "sampler": ScorerKind("lavis_lstp.models.where.chooser:SamplerScorer", by_frame=False),
    "clip": ScorerKind(f"{_SCORERS}:dual_encoder", "openai/clip-vit-large-patch14"),
    "siglip": ScorerKind(f"{_SCORERS}:dual_encoder", "google/siglip2-so400m-patch14-384"),
    "itm": ScorerKind(f"{_SCORERS}:matching", "Salesforce/blip2-itm-vit-g"),
    "itc": ScorerKind(f"{_SCORERS}:matching", "Salesforce/blip2-itm-vit-g"),
    "conse": ScorerKind(f"{_SCORERS}:conse"),
    "answerer": ScorerKind(f"{_SCORERS}:AnswererScorer", by_frame=False),
}
"""`scorer.name` -> what gives selectors their scores. sampler: the temporal sampler. clip, siglip: any model of two
towers. itm, itc: image-text matching of BLIP and BLIP-2. conse: a classifier and a text encoder of the extra `real`.
answerer: the model's own "yes"."""


OF_LAVIS = ("blip_image_text_matching", "blip2_image_text_matching")
"""LAVIS's models that itm and itc can ask in place of transformers': `scorer.arch`."""


def asks_sampler(selector: str, scorer: str = "sampler") -> bool:
    """Return whether the temporal sampler must be asked before this selector can choose."""
    needs = SELECTORS[selector].needs
    return "logits" in needs or ("scores" in needs and scorer == "sampler")


FLOWS = ("raft_large", "raft_small", "dis", "motion_vectors", "precomputed", "none")
MODEL_KEYS = frozenset({"arch", "model_type", "load_finetuned", "load_pretrained", "finetuned", "pretrained"})
"""Keys that LAVIS's Config and BaseModel read for every model."""

LAYERS, WIDTH, TOKENS, SIDE = 1_000, 1_000_000, 10_000_000, 100_000
"""Largest sizes that are taken for meant: layers, features, entries of a vocabulary or positions, pixels."""


@dataclass
class Lora:
    """Published: {r: 8, alpha: 32, dropout: 0.1}."""

    r: int = key(8, least=1, most=WIDTH)  # rank
    alpha: int | float = key(32, above=0)  # adapters are scaled by alpha / r
    dropout: int | float = key(0.1, least=0, below=1)
    targets: list[str] | None = key()  # names of linear layers; null = q_proj and v_proj of LLaMA, q and v of T5


@dataclass
class Refinement:
    """Self-refinement: the pseudo spans of each batch are made in its training step, in eval mode."""

    in_loop: bool = key(False)  # false = spans come with the data
    subtract_min: bool = key(True)  # subtract each video's smallest score first
    smooth: int = key(1, least=1)  # window in frames of a moving average over the scores; 1 = none
    max_new_tokens: int = key(127, least=1)  # of a frame's own greedy answer


@dataclass
class Flow:
    name: str = key("raft_large", one_of=FLOWS, called="flow")  # how it is found; none = the sampler sees zeros
    flow_size: int | None = key(224, least=1, most=SIDE)  # px, side of the field the sampler sees; null = the frames'
    flow_preset: str = key(
        "none", one_of=("none", "published_training", "published_inference"), called="flow_preset"
    )  # how the published code scales it
    weights: str | None = (
        key()
    )  # RAFT: file; null = torchvision's in torch's cache; checkpoint = a checkpoint brings them
    iterations: int = key(20, least=1)  # RAFT: updates of a field
    pairs_at_once: int = key(8, least=1)  # RAFT: its batch; a pair of 224 px takes about 0.1 GB
    dis_preset: str = key("medium", one_of=("ultrafast", "fast", "medium"), called="dis_preset")  # dis


@dataclass
class Sampler:
    weights: str | None = key()  # BERT that a fresh sampler starts from: hub id or folder; null = random
    tokenizer: str | None = key()  # hub id or folder; null = the Q-Former's
    max_text_tokens: int = key(128, least=1)  # questions are cut to this many tokens
    mode: str = key(
        "fusion", one_of=("fusion", "multi_modal")
    )  # fusion: layers from fusion_layer on; multi_modal: all layers
    hidden_size: int = key(768, least=1, most=WIDTH)
    num_layers: int = key(12, least=1, most=LAYERS)
    num_heads: int = key(12, least=1, most=WIDTH)
    intermediate_size: int = key(3072, least=1, most=WIDTH)
    vocab_size: int | None = key(30522, least=1, most=TOKENS)  # null = of the tokenizer
    max_positions: int = key(512, least=1, most=TOKENS)  # flows + 2, and text tokens, can be at most this many
    fusion_layer: int = key(6, least=0, most=LAYERS)  # the first one that sees the text
    text_width: int = key(768, least=1, most=WIDTH)
    rotary_init: str = key("sinusoid", one_of=("sinusoid", "normal"), called="rotary_init (model.sampler)")
    dropout: int | float = key(0.1, least=0, below=1)
    flow_size: int = key(224, least=1, most=SIDE)  # px, a multiple of 16
    window: int | None = key(None, least=2, most=TOKENS)  # long videos: so many flows are scored at a time; null = all
    overlap: int | None = key(
        None, least=0, most=TOKENS
    )  # flows that two windows share; null = a quarter of the window
    fold_flow: bool = key(False)  # convolution and linear map as one: faster, equal to 1e-5
    flow_scale: int | float = key(1.0, above=0)  # the sampler sees flow times this; 10 to 100 where motion is small
    subtract_camera: bool = key(False)  # of each field its median, mostly the camera's motion, is subtracted first


@dataclass
class Selector:
    name: str = key("lstp", one_of=SELECTORS, called="selector (model.selector.name)")
    context: int = key(0, least=0)  # frames added on both sides of a found or given span
    # K, frames shown to the language model; auto: of each question as many as its best scores need to reach `mass`
    num_selected: int | str = key(4, least=1, word=AUTO)
    least_selected: int = key(1, least=1)  # auto: at least and at most so many
    most_selected: int = key(16, least=1)
    mass: int | float = key(0.8, above=0, most=1)  # auto: share of the sum of all scores above the lowest
    max_spans: int = key(
        1, least=1, most=64
    )  # best_span, lstp: at most so many spans are found, frames are of them all
    # of aks, inverse_transform, focus and global_local, such as {power: 2.0}; selectors.py lists them
    settings: dict[str, Any] = key({})
    span_key: str = key(
        "span", one_of=("span", "gold_span")
    )  # given: span (pseudo spans) or gold_span (oracle, evaluation only)
    few_frames: str = key(
        "double", one_of=("double", "keep")
    )  # of a span with fewer than K frames: double them, or keep (published image+video)
    grid: int | None = key(None, least=1)  # argmax, gumbel: choose among so many evenly spaced frames (published: 32)
    marks: int = key(0, least=0)  # argmax, gumbel: flows counted beyond the video's (published video recipes: 2)
    mapping: str = key(
        "ends", one_of=("ends", "ratio")
    )  # argmax, gumbel: flow to frame, ends (published BLIP-2) or ratio (InstructBLIP)


@dataclass
class Scorer:
    """The source of a selector's scores; a selector without scores, or of the sampler's logits, uses none of it."""

    name: str = key("sampler", one_of=SCORERS, called="scorer (model.scorer.name)")
    weights: str | None = key()  # hub id or folder; with arch: LAVIS's checkpoint; null = the usual ones
    arch: str | None = key(
        None, one_of=OF_LAVIS, called="arch (model.scorer.arch)"
    )  # itm, itc: LAVIS's model in place of transformers'
    model_type: str | None = key()  # of that: base, large; pretrained, coco; null = its first
    prompt: str | None = key()  # with {question}; null = the scorer's own
    batch: int = key(32, least=1, most=4096)  # frames at once
    dtype: str = key("float32", one_of=("float32", "float16", "bfloat16"), called="dtype (model.scorer)")


@dataclass
class Sizes:
    """Numbers of transformers' configurations that must be sizes; each part has some of them."""

    hidden_size: int = key(1, least=1, most=WIDTH)
    intermediate_size: int = key(1, least=1, most=WIDTH)
    encoder_hidden_size: int = key(1, least=1, most=WIDTH)
    ffn_dim: int = key(1, least=1, most=WIDTH)
    word_embed_proj_dim: int = key(1, least=1, most=WIDTH)
    d_model: int = key(1, least=1, most=WIDTH)
    d_ff: int = key(1, least=1, most=WIDTH)
    d_kv: int = key(1, least=1, most=WIDTH)
    head_dim: int | None = key(None, least=1, most=WIDTH)
    num_heads: int = key(1, least=1, most=WIDTH)
    num_attention_heads: int = key(1, least=1, most=WIDTH)
    num_key_value_heads: int | None = key(None, least=1, most=WIDTH)
    num_hidden_layers: int = key(1, least=1, most=LAYERS)
    num_layers: int = key(1, least=1, most=LAYERS)
    num_decoder_layers: int | None = key(None, least=1, most=LAYERS)
    cross_attention_frequency: int = key(1, least=1, most=LAYERS)
    image_size: int = key(1, least=1, most=SIDE)
    patch_size: int = key(1, least=1, most=SIDE)
    vocab_size: int = key(1, least=1, most=TOKENS)
    max_position_embeddings: int = key(1, least=1, most=TOKENS)
    relative_attention_num_buckets: int = key(1, least=1, most=TOKENS)
    relative_attention_max_distance: int = key(1, least=1, most=TOKENS)
    initializer_range: int | float = key(0, least=0)
    initializer_factor: int | float = key(0, least=0)
    layer_norm_eps: int | float = key(0, least=0)
    layer_norm_epsilon: int | float = key(0, least=0)
    rms_norm_eps: int | float = key(0, least=0)
    rope_theta: int | float = key(1, above=0)
    hidden_dropout_prob: int | float = key(0, least=0, most=1)
    attention_probs_dropout_prob: int | float = key(0, least=0, most=1)
    attention_dropout: int | float = key(0, least=0, most=1)
    dropout_rate: int | float = key(0, least=0, most=1)
    dropout: int | float = key(0, least=0, most=1)


@dataclass
class BackboneConfig:
    num_query_tokens: int = key(32, least=1, most=TOKENS)
    initializer_range: int | float = key(0.02, least=0)
    initializer_factor: int | float = key(1.0, least=0)
    vision_config: dict[str, Any] = key({}, keys=Sizes, open=True)
    qformer_config: dict[str, Any] = key({}, keys=Sizes, open=True)
    text_config: dict[str, Any] = key({}, keys=Sizes, open=True)


@dataclass
class Served:
    """Asking a server; its address and key are taken from OPENAI_BASE_URL and OPENAI_API_KEY."""

    frames: str = key("video", one_of=("video", "images"))  # video: JPEG frames with their seconds, as vLLM takes them
    image_size: int = key(448, least=1, most=SIDE)  # px, side of the frames that `ask` and lmms-eval read
    concurrency: int = key(8, least=1, most=1000)  # questions of a batch under way at a time
    retries: int = key(6, least=0, most=1000)  # of each question, waiting as long as the server says
    timeout_s: int | float = key(120, above=0)  # of one attempt
    cache: str | None = key()  # SQLite file of answers; null = lavis_lstp/answers.sqlite in the user's cache


@dataclass
class Backbone:
    source: str = key(
        "hub", one_of=SOURCES, called="source (model.backbone.source)"
    )  # hub: BLIP-2 and InstructBLIP; lavis: LAVIS's own; transformers: any video model with a chat template,
    # and these, their frames' tokens end to end; endpoint: a model of a server
    family: str = key("instructblip", one_of=("instructblip", "blip2"), called="backbone family")  # hub
    arch: str | None = key()  # lavis: blip2_t5, blip2_opt; with its git main blip2_vicuna_instruct, blip2_t5_instruct
    model_type: str | None = key()  # lavis: its type
    weights: str | None = (
        key()
    )  # hub: id or folder; null = random of the sizes in `config`. lavis: a .pth. endpoint: its name there
    dtype: str = key(
        "bfloat16", one_of=("float32", "bfloat16", "float16"), called="dtype (model.backbone.dtype)"
    )  # of what does not learn
    attention: str | None = key(
        None, one_of=("sdpa", "eager", "flash_attention_2")
    )  # null = transformers' choice; sdpa, eager, flash_attention_2
    quantization: str | None = key(
        None, one_of=("8bit", "4bit")
    )  # of a frozen language model: 8bit, 4bit (bitsandbytes)
    gradient_checkpointing: bool = key(False)
    times_in_prompt: bool = key(False)  # transformers: the frames' seconds before the prompt, for models not told them
    endpoint: Served = key(Served)
    compile: bool = key(False)  # torch.compile of vision tower, Q-Former and language model
    seed: int = key(0, least=0, most=SEED)  # of random weights, and of a fresh sampler
    max_text_tokens: int = key(512, least=1)  # prompts and answers are cut to this many tokens
    config: dict[str, Any] | None = key(None, keys=BackboneConfig, open=True)  # random weights: sizes; lavis: overrides


Token = Annotated[int, ("least", 0)]


@dataclass
class Generation:
    """Settings of transformers' GenerationConfig that have a range or a form; its other keys are legal, too."""

    max_new_tokens: int | None = key(None, least=1)
    min_new_tokens: int | None = key(None, least=0)
    max_length: int | None = key(None, least=1)
    min_length: int | None = key(None, least=0)
    max_time: int | float | None = key(None, above=0)  # seconds
    do_sample: bool | None = key()
    use_cache: bool | None = key()
    num_beams: int | None = key(None, least=1)
    num_beam_groups: int | None = key(None, least=1)
    num_return_sequences: int | None = key(None, least=1)
    no_repeat_ngram_size: int | None = key(None, least=0)
    encoder_no_repeat_ngram_size: int | None = key(None, least=0)
    top_k: int | None = key(None, least=0)
    top_p: int | float | None = key(None, above=0, most=1)
    min_p: int | float | None = key(None, least=0, most=1)
    top_h: int | float | None = key(None, above=0, most=1)
    typical_p: int | float | None = key(None, above=0, most=1)
    temperature: int | float | None = key(None, least=0)
    epsilon_cutoff: int | float | None = key(None, least=0, below=1)
    eta_cutoff: int | float | None = key(None, least=0, below=1)
    penalty_alpha: int | float | None = key(None, least=0)
    length_penalty: int | float | None = key()
    diversity_penalty: int | float | None = key(None, least=0)
    repetition_penalty: int | float | None = key(None, above=0)
    encoder_repetition_penalty: int | float | None = key(None, above=0)
    early_stopping: bool | str | None = key(None, word="never")
    remove_invalid_values: bool | None = key()
    renormalize_logits: bool | None = key()
    bad_words_ids: list[list[Token]] | None = key()  # sequences of tokens that no answer holds
    sequence_bias: list[tuple[list[Token], int | float]] | None = key()  # what is added to the score of a sequence
    suppress_tokens: list[Token] | None = key()
    begin_suppress_tokens: list[Token] | None = key()
    forced_bos_token_id: Token | None = key()
    forced_eos_token_id: Token | None = key()
    # tokens after which it begins, and the factor for each further one
    exponential_decay_length_penalty: tuple[Token, Annotated[int | float, ("above", 0)]] | None = key()


@dataclass
class ModelSettings:
    """LSTP over InstructBLIP or BLIP-2 at full size."""

    arch: str | None = key()  # lstp_vicuna7b, lstp_flant5xl, lstp_instruct_flant5xl, lstp_tiny
    model_type: str | None = key("default")
    # Checkpoint(s) over the backbone's weights: a run's folder, a checkpoint folder, a converted folder, a file, or a
    # list of them; null = none.
    checkpoint: Any = key(kind=TEXTS)
    # What learns; it is held in float32.
    train: list[str] | None = key(["qformer", "query_tokens", "projection"], one_of=PARTS, called="part (model.train)")
    # lm: answer the question; span: find the span (needs datasets.<name>.spans, or refinement). The sampler learns
    # from span alone.
    losses: list[str] = key(["lm"], one_of=("lm", "span"), called="loss (model.losses)")
    lora: dict[str, Any] | None = key(None, keys=Lora)  # low-rank adapters on the language model; null = none
    refinement: Refinement = key(Refinement)
    flow: Flow = key(Flow)
    store: bool = key(False)  # keep computed flow and a scorer's features on disk for all runs: `lavis-lstp cache`
    sampler: Sampler = key(Sampler)
    # false = as published: padded flows compete with real ones, in the span loss and in the selectors argmax and gumbel
    mask_padding: bool = key(True)
    frozen_dropout: bool = key(
        False
    )  # true = as published: a language model that does not learn trains with its dropout
    selector: Selector = key(Selector)
    scorer: Scorer = key(Scorer)
    selection_seed: int = key(0, least=0, most=SEED)  # of `random` and `gumbel` in evaluation
    backbone: Backbone = key(Backbone)
    fusion: str = key("mean", one_of=("concat", "mean"))
    # {question} is the question; data that bring whole prompts (conversations) bypass `prompt`
    prompt: str = key("USER: <video>\n{question} ASSISTANT: ")
    answer_template: str = key("{answer}</s>")
    sampler_prompt: str = key("{question}")
    generation: dict[str, Any] | None = key(
        {"max_new_tokens": 128, "num_beams": 1, "do_sample": False}, keys=Generation, open=True
    )  # of transformers' GenerationConfig


def scorer_settings(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a scorer that is given as NAME, as NAME=WEIGHTS, or by some of them.

    >>> found = scorer_settings("itm=blip_image_text_matching/large")  # LAVIS's own model, and its type
    >>> found["weights"], found["arch"], found["model_type"]
    (None, 'blip_image_text_matching', 'large')

    Raises:
        ConfigError: a name is not known, or a value cannot be used.
    """
    if isinstance(given, str):
        name, _, weights = given.partition("=")
        arch, _, model_type = weights.partition("/")
        of_lavis = {"arch": arch, "model_type": model_type or None}
        given = {"name": name, **(of_lavis if arch in OF_LAVIS else {"weights": weights or None})}
    return {**vars(Scorer()), **checked(given, Scorer, "scorer")}


def checked_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """A `model` section, every value as its field declares it; it need not be complete.

    Raises:
        ConfigError: a key that nobody reads, or a value that cannot be used.
    """
    return checked(given, ModelSettings, "model", MODEL_KEYS)


class Used(NamedTuple):
    """Parts of a model beside its answerer. A part that is not used is neither built nor loaded nor demanded."""

    sampler: bool
    flow: bool
    scorer: bool


def used_parts(model: Mapping[str, Any]) -> Used:
    """Return what a complete `model` section uses: its sampler, if that selects or learns, its flow, and a scorer."""
    selector, scorer = model["selector"]["name"], model["scorer"]["name"]
    by_sampler = asks_sampler(selector, scorer)
    sampler = by_sampler or "span" in model["losses"] or "sampler" in (model["train"] or ())
    return Used(sampler, flow=sampler, scorer="scores" in SELECTORS[selector].needs and scorer != "sampler")


def leave_unused_flow_out(model: Mapping[str, Any], datasets: Mapping[str, Any]) -> list[str]:
    """Sets `flow: none` in the data sets' sections where the model looks at no flow: nobody has to have made it.

    Returns:
        Names of the data sets that would have brought some.
    """
    changed = []
    for name, section in datasets.items() if not used_parts(model).flow else ():
        if section and section.get("flow", "none") != "none":
            section["flow"] = "none"
            section.update({key: None for key in ("flow_root", "max_flows") if key in section})
            section.update({key: "sampled" for key in ("flow_pairs",) if key in section})
            changed.append(name)
    return changed


def check_together(
    *,
    train: Sequence[str],
    losses: Sequence[str],
    in_loop: bool,
    prompt: str,
    sampler_prompt: str,
    answer_template: str,
) -> None:
    """Settings that would otherwise fail, or do nothing, in the middle of a run.

    Raises:
        ConfigError: one line on which and why.
    """
    for name, value in (("train", train), ("losses", losses)):
        if len(set(value)) < len(value):
            raise ConfigError(f"model.{name} names something twice: {list(value)}; name each once")
    if in_loop and "span" not in losses:
        raise ConfigError("model.refinement.in_loop makes spans for the loss 'span'; add it to model.losses")
    learning = set(train)
    for loss, trained_by_it in (("span", learning & {"sampler"}), ("lm", learning - {"sampler"})):
        if learning and bool(trained_by_it) != (loss in losses):
            parts_named = ", ".join(sorted(trained_by_it)) or "nothing"
            raise ConfigError(
                f"model.losses {list(losses)} and model.train {list(train)} do not go together: "
                f"the loss '{loss}' trains {parts_named} of these; {'add' if trained_by_it else 'remove'} it"
            )
    templates = {"prompt": prompt, "sampler_prompt": sampler_prompt, "answer_template": answer_template}
    for name, text in templates.items():
        field = "answer" if name == "answer_template" else "question"
        if f"{{{field}}}" not in text:
            raise ConfigError(f"model.{name} must contain {{{field}}}, got {text!r}")


def check_recorded(model: Mapping[str, Any], datasets: Mapping[str, Any]) -> None:
    """Raise ConfigError where data sets bring recorded frames and the model chooses others, or the other way round."""
    wanted = SELECTORS[model["selector"]["name"]].needs == ("record",)
    for name, section in datasets.items():
        if bool((section or {}).get("selection")) != wanted:
            raise ConfigError(
                f"datasets.{name}.selection and model.selector.name={model['selector']['name']} do not go together: "
                + (
                    "the selector shows what a data set has recorded; name a file there"
                    if wanted
                    else "recorded frames are shown by model.selector.name=recorded alone"
                )
            )


def check_scorer(model: Mapping[str, Any]) -> None:
    """Raise ConfigError for a scorer that its selector cannot choose by, or a prompt without a question."""
    selector, scorer = model["selector"]["name"], model["scorer"]["name"]
    source = model["backbone"]["source"]
    if "features" in SELECTORS[selector].needs and not SCORERS[scorer].by_frame and source not in SEE_FRAMES:
        raise ConfigError(
            f"model.selector.name: {selector} compares features of frames, and neither scorer '{scorer}' nor "
            f"model.backbone.source {source} has some; set model.scorer.name to one of "
            f"{', '.join(name for name, kind in SCORERS.items() if kind.by_frame)}"
        )
    prompt = model["scorer"]["prompt"]
    if prompt is not None and "{question}" not in prompt:
        raise ConfigError(f"model.scorer.prompt must contain {{question}}, got {prompt!r}")


def check_complete_model(model: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value of a complete `model` section that cannot be used, or values that do not fit."""
    model = {**model, **checked_model(model)}  # an interpolation may stand for a number where text is expected
    check_scorer(model)
    check_generation(model["generation"] or {}, "model.generation")
    together = {name: model[name] for name in ("losses", "prompt", "sampler_prompt", "answer_template")}
    check_together(train=model["train"] or (), in_loop=model["refinement"]["in_loop"], **together)
