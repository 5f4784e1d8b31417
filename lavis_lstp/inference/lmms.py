"""Our models in lmms-eval, which finds `manifests` as an entry point of the group `lmms_eval.models`.

    python -m lmms_eval --model lstp_vicuna7b --tasks nextqa_mc_test --batch_size 8
    python -m lmms_eval --model lstp_tiny --model_args checkpoint=output/demo/lstp --tasks TASK

In: requests of lmms-eval. Out: answers, or how likely given ones are. Frames, batches and answers come from what
`lavis.evaluate` uses, so they are the same. lmms-eval 0.7 is imported where it asks for these models, nowhere else.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lavis_lstp.errors import ConfigError, unknown_name
from lavis_lstp.inference.lmms_requests import Questions, Request, cut, generation_settings, questions_of
from lavis_lstp.inference.predictor import Predictor
from lavis_lstp.models.variants import MODEL_TYPES
from lavis_lstp.models.weights.recorded import recorded_frames, recorded_model, recorded_reading
from lavis_lstp.schema import Batch

logger = logging.getLogger(__name__)

DEFAULT_FRAMES = 32
"""T where no run says how many: that of the data sets."""
OPTION_SCORES = ("mean", "sum")
SELECTING = "lstp_select"
"""Any other model of lmms-eval behind a selection of ours, see `lmms_select`."""


def manifests() -> list:
    """The entry point: a manifest of lmms-eval for each of our models."""
    from lmms_eval.models.registry_v2 import ModelManifest

    ours = [ModelManifest(model_id=name, simple_class_path=f"{__name__}.{name}") for name in MODEL_TYPES]
    return [*ours, ModelManifest(model_id=SELECTING, chat_class_path=f"{__name__}_select.{SELECTING}")]


def __getattr__(name: str) -> type:
    """`lstp_tiny` and the others: subclasses of lmms-eval's base class, so made when lmms-eval asks for one."""
    if name not in MODEL_TYPES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms

    made = type(name, (LstpAnswers, lmms), {"MODEL": name, "__module__": __name__})
    globals()[name] = made
    return made


class LstpAnswers:
    """What lmms-eval calls on a model, under a subclass for each of our names.

    Args (lmms-eval's --model_args):
        model_type: of the model; default: its default type.
        checkpoint: a run's folder, one of its checkpoints, or a weights file.
        options: `model.a.b=c` overrides, with blanks between them.
        num_frames: evenly spaced frames read of a video; default: as many as the checkpoint's run read, else 32.
        option_score: mean or sum of the log-probabilities of an option's tokens.
        question_key: of documents, where the bare question stands that frames are found by.
        num_workers: processes that decode.
        batch_size, device: lmms-eval's --batch_size and --device.
    """

    MODEL = ""
    is_simple = True

    def __init__(
        self,
        model_type: str | None = None,
        checkpoint: str | None = None,
        options: str = "",
        num_frames: int | None = None,
        option_score: str = "mean",
        question_key: str = "question",
        num_workers: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        known = ("model_type", "checkpoint", "options", "num_frames", "option_score", "question_key", "num_workers")
        for name in unknown:
            raise ConfigError(unknown_name(f"--model_args of {self.MODEL}", name, (*known, "batch_size", "device")))
        if option_score not in OPTION_SCORES:
            raise ConfigError(unknown_name("option_score", option_score, OPTION_SCORES))
        self.batch_size = _whole_number("batch_size", batch_size, 1)
        self.num_workers = _whole_number("num_workers", num_workers, 0)
        self.option_score, self.question_key = option_score, question_key
        given = ["model.train=[]", *shlex.split(str(options))]
        recorded = recorded_model(checkpoint, given).get("arch") if checkpoint else None
        if recorded not in (None, self.MODEL):
            raise ConfigError(f"checkpoint {checkpoint} is of {recorded}, not of {self.MODEL}; use --model {recorded}")
        frames = recorded_frames(checkpoint, default=DEFAULT_FRAMES) if num_frames is None else num_frames
        self.num_frames = _whole_number("num_frames", frames, 1)
        self.reading, _ = recorded_reading(checkpoint)
        # Nothing learns here: what does not is held in the backbone's dtype, as in the recipes of projects/lstp/eval.
        self.predictor = Predictor.build(
            self.MODEL, model_type, checkpoint, given, num_frames=self.num_frames, device="cpu"
        )
        self.model = self.predictor.model
        for note in self.predictor.notes:
            logger.warning("%s: %s", self.MODEL, note)
        self._place(device)

    def _place(self, device: str | None) -> None:
        """The model on its device; one process of several takes the one that accelerate gives it."""
        import torch
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        own = device is not None and self.accelerator.num_processes == 1
        self.device = torch.device(device) if own else self.accelerator.device
        self.model.to(self.device)

    # ---- what lmms-eval calls -----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request. Equal requests are answered once, unless answers are drawn."""
        read = [Request.read(request.args) for request in requests]
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(read):
            settings = generation_settings(request.wanted or {}, request.document_name)
            groups.setdefault(json.dumps(settings, sort_keys=True), []).append(number)
        texts = [""] * len(read)
        for key, numbers in groups.items():
            settings, until = json.loads(key)
            drawn = {**self.model.generation, **settings}.get("do_sample", False)
            questions, asked = self._questions([read[i] for i in numbers], apart=drawn)
            found = self._ask(questions, lambda s, settings=settings: self.model.answer(s, **settings)["prediction"])
            for number, name in zip(numbers, asked, strict=True):
                texts[number] = cut(found[name], until)
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> list:
        """`losses`, each wrapped: the evaluator of lmms-eval 0.7.3 makes a text of a bare pair."""
        from lmms_eval.api.instance import GenerationResult

        return [GenerationResult(pair) for pair in self.losses(requests)]

    def losses(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each request the loss of its continuation, end mark included, and whether greedy search would say it.

        lmms-eval takes the option with the lowest number, so this is minus the log-probability.
        """
        read = [Request.read(request.args) for request in requests]
        options = [_continuation(request, self.task_dict) for request in read]
        questions, asked = self._questions(read, options=options)

        def scores(samples: Batch) -> list[dict[str, tuple[float, bool]]]:
            scored = self.model.score_options(samples)
            rows = zip(samples["options"], scored["option_log_prob"], scored["option_greedy"], strict=True)
            return [
                {option: (-log_prob[self.option_score], greedy) for option, log_prob, greedy in zip(*row, strict=True)}
                for row in rows
            ]

        found = self._ask(questions, scores)
        return [found[name][option] for name, option in zip(asked, options, strict=True)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise ConfigError(f"{self.MODEL} answers one question at a time; leave out tasks of several rounds")

    @property
    def chat_template(self) -> str:
        raise ConfigError(f"{self.MODEL} has a prompt of its own (model.prompt); leave out --apply_chat_template")

    # ---- questions and batches ----------------------------------------------------------------------------------

    def _questions(self, requests: Sequence[Request], **how: Any) -> tuple[Questions, list[str]]:
        def as_prompt(context: str) -> str:
            return self.model.prompts({"text_input": [context]})[0]

        return questions_of(requests, self.task_dict, question_key=self.question_key, as_prompt=as_prompt, **how)

    def _ask(self, questions: Questions, step: Callable[[Mapping[str, Any]], list]) -> dict[str, Any]:
        """{question id: what `step` says of its row}, in the batches of `lavis.evaluate`."""
        from lavis_lstp.runners.evaluation import steps, to_device

        def named(samples: Batch) -> list[tuple[str, Any]]:
            return list(zip(samples["question_id"], step(samples), strict=True))

        answers: dict[str, Any] = {}
        for samples in self._batches(questions):
            answers.update(steps(named, to_device(samples, self.device), self.batch_size))
        return answers

    def _batches(self, questions: Questions) -> Iterator[Mapping[str, Any]]:
        from lavis_lstp.data.qa_dataset import VideoQADataset
        from lavis_lstp.runners.data_order import Batches
        from lavis_lstp.runners.evaluation import units_of
        from lavis_lstp.runners.record import progress

        chooser = self.model.chooser
        size = chooser.signal.flow_size if chooser.signal is not None else None
        dataset = VideoQADataset(
            questions,
            num_frames=self.num_frames,
            image_size=self.model.backbone.image_size,
            flow="motion_vectors" if chooser.flow_from_data == "motion_vectors" else "none",
            flow_size=size[0] if size else None,
            **self.reading,
        )
        units = units_of(dataset, self.batch_size)
        workers = min(self.num_workers, len(units))
        loader = Batches(dataset, seed=0, num_workers=workers, pin_memory=self.device.type == "cuda")
        main = self.accelerator.is_main_process
        yield from progress(loader(units), total=len(units), title=self.MODEL, main=main)


def _whole_number(name: str, value: Any, least: int) -> int:
    if not str(value).isdecimal() or int(value) < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def _continuation(request: Request, documents: Mapping[str, Mapping[str, Any]]) -> str:
    """What is to be scored, without the blank that lmms-eval puts in front: where a prompt ends, the model's own
    template says."""
    wanted = request.wanted
    if callable(wanted):
        wanted = wanted(documents[request.task][request.split][request.doc_id])
    if not isinstance(wanted, str) or not wanted.strip():
        raise ConfigError(f"{request.document_name}: expected a text to score, got {wanted!r}")
    return wanted.strip()
