"""`lavis-lstp estimate --cfg-path RECIPE --gpus 8`: how much memory a training run takes, before it is started.

In: a recipe, a number of processes, and the lengths of the texts. Out: bytes of parameters, gradients, optimizer,
communication and activations in each process, and whether the device has them.

The model is built without any memory (torch's device "meta"), and one forward and backward of a batch of the recipe's
size is made with it, which tells to the byte what is alive at each moment. What a ZeRO stage divides is arithmetic.
Nothing is loaded: weights that a recipe takes from the hub have known sizes (`models/published_sizes.py`).
Of a recipe whose model answers behind a server (backbone.source=endpoint): questions, about how many tokens, and cost.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lavis_lstp.config.model import AUTO
from lavis_lstp.errors import ConfigError
from lavis_lstp.redaction import printable
from lavis_lstp.schema import Batch

GIB, MIB = 2**30, 2**20
MOMENTS = 8
"""Bytes of Adam's two moments for each trained number."""
UPDATE = 8
"""Bytes that Adam needs in passing for each number of a flat partition: its gradient in fp32, and a denominator."""
MAX_LIVE = 1_000_000_000
"""Numbers that stage 3 keeps collected (`stage3_max_live_parameters`), where the configuration says nothing."""
CONTEXT = GIB
"""What a CUDA process is taken to hold beside tensors: on an H200 context and kernels took 0.75 GiB, rounding 0.2."""


TOKENS_PER_FRAME = 256
"""Tokens of a picture of 448 px, about: Qwen2.5-VL makes 256 of one alone, and two frames of a video share them."""


@dataclass(frozen=True)
class Estimate:
    """Bytes in each process at the fullest moment of a step.

    Attributes:
        activations: with what is between them and the gradients; or, where that is more, what the update needs after
            they are gone.
    """

    parameters: float
    gradients: float
    optimizer: float
    communication: float
    activations: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that come and go; those that are there at the start are not counted."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.counted = {id(t.untyped_storage()) for t in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        if func is torch.ops.aten.index.Tensor and args[0].is_meta:  # a mask counts as full
            args = (args[0], [place for index in args[1] for place in _places(index)])
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype.is_floating_point * 1.0 if args[0].dtype != torch.bool else False
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            found = args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
        else:
            found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if torch.is_tensor(tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.counted:
            return
        self.counted.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.counted.discard(key)
        self.now -= size


def _places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return an index as it is, and a mask as the places, one tensor a dimension, of all its values."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.ndim)]


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps for its backward pass: not the probabilities, which the meta device would."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextlib.contextmanager
def _without_data() -> Iterator[None]:
    """Let a model run where there are no values: attention keeps what a fused kernel does."""
    plain = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = lambda q, k, v, *args, **more: _FusedAttention.apply(q, k, v)
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = plain


# ---- the model and its batch -------------------------------------------------------------------------------------


def build_without_memory(model_cfg: Any) -> nn.Module:
    """The recipe's model on the meta device.

    Raises:
        ConfigError: its class is not of this package, or the sizes of its weights are not known.
    """
    from lavis.common.registry import registry

    from lavis_lstp.config.other_keys import is_ours
    from lavis_lstp.models.weights.published_sizes import PUBLISHED_SIZES
    from lavis_lstp.models.where.frame_selector import build_selector

    model_cls = registry.get_model_class(model_cfg.arch)
    if not is_ours(model_cls) or model_cfg.backbone.source != "hub":
        raise ConfigError(
            f"cannot estimate model.arch {model_cfg.arch}: only models with backbone.source=hub are known"
        )
    model_cfg = copy.deepcopy(model_cfg)
    name = model_cfg.backbone.weights
    if name:
        if name not in PUBLISHED_SIZES:
            raise ConfigError(f"the sizes of {name} are not known; known: {', '.join(sorted(PUBLISHED_SIZES))}")
        model_cfg.backbone.config = PUBLISHED_SIZES[name]
    for section, key in (("backbone", "weights"), ("backbone", "quantization"), ("sampler", "weights")):
        model_cfg[section][key] = None
    model_cfg.sampler.tokenizer = model_cfg.checkpoint = model_cfg.flow.weights = None
    model_cfg.flow.name = "none"  # it is frozen and small, and its fields come and go before the rest
    model_cfg.refinement.in_loop = False  # its answers are made and gone before the step
    with torch.device("meta"):
        model = model_cls.from_config(model_cfg).to("meta")
    # which frames are shown is no matter of size, and nothing can be read of what has none
    model.chooser.selector = build_selector("uniform", num_selected=model.selector.most)
    return model


def example(
    model: nn.Module, *, batch: int, frames: int, prompt_tokens: int, answer_tokens: int, device: str = "meta"
) -> dict[str, Any]:
    """A batch of the largest samples: videos, and texts of so many words, which the tokenizer cuts to its limit."""
    size = model.backbone.image_size
    flow_size = 16 if model.sampler is None else model.sampler.flow_embedding.grid * 16
    return {
        "frames": torch.zeros(batch, frames, 3, size, size, dtype=torch.uint8),
        "flow": torch.zeros(batch, frames, 2, flow_size, flow_size, device=device),
        "frame_mask": torch.ones(batch, frames, dtype=torch.long),
        "text_input": ["a " * prompt_tokens] * batch,
        "text_output": ["a " * answer_tokens] * batch,
        "question_id": [str(i) for i in range(batch)],
        "span": torch.tensor([[0, 2]] * batch),
    }


def activation_bytes(model: nn.Module, samples: Batch, *, keep_gradients: bool) -> int:
    """What is alive at the fullest moment of a forward and backward, beside the weights.

    Args:
        keep_gradients: they are whole in each process; otherwise each is dropped when it is made.
    """

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [] if keep_gradients else [p.register_post_accumulate_grad_hook(drop) for p in trained]
    model.train()
    alive = Alive(model)
    with _without_data(), alive:
        model(samples)["loss"].backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    return alive.peak


# ---- what a stage divides ----------------------------------------------------------------------------------------


def divide(
    model: nn.Module,
    samples: Batch,
    *,
    processes: int,
    precision: str,
    accumulate: int,
    deepspeed: Mapping[str, Any] | None,
) -> Estimate:
    """Bytes in each of `processes`.

    Args:
        deepspeed: a complete configuration; None = runner_lstp.
    """
    zero = (deepspeed or {}).get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    halved = deepspeed is not None and precision == "bf16"  # plain PyTorch casts as it goes, and keeps the weights
    model = model.to(torch.bfloat16) if halved else model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    gradient = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    share = processes if stage else 1
    copies = 4 * trained if halved or stage else 0  # ZeRO has fp32 copies of its own, of fp32 weights too
    casts = 2 * trained if precision == "bf16" and not halved else 0
    model = model.to(torch.bfloat16) if casts else model
    together = stage < 2 and accumulate == 1 and not casts  # gradients come as activations go
    activations = activation_bytes(model, samples, keep_gradients=together) + casts - (gradient if together else 0)
    update = UPDATE * trained / share if stage else 0
    parts = {
        "parameters": float(weights),
        "gradients": gradient / (processes if stage >= 2 else 1),
        "optimizer": (MOMENTS * trained + copies) / share,
        "communication": _communication(zero, stage, gradient, trained, processes, plain=deepspeed is None),
        "activations": float(max(activations, update)),
    }
    if stage == 3 and processes > 1:
        numbers = sum(p.numel() for p in model.parameters())
        live = min(zero.get("stage3_max_live_parameters", MAX_LIVE), numbers)
        parts["parameters"] = weights / processes + weights * live / numbers
    if (zero.get("offload_optimizer") or {}).get("device") == "cpu":
        parts["optimizer"] = 0.0
    if (zero.get("offload_param") or {}).get("device") == "cpu":
        parts["parameters"] -= weights / processes
    return Estimate(**parts)


def _communication(
    zero: Mapping[str, Any], stage: int, gradient: int, trained: int, processes: int, *, plain: bool
) -> float:
    """Buffers in which gradients are exchanged."""
    if plain:
        return float(gradient) if processes > 1 else 0.0  # DDP's buckets
    if stage == 0:
        return float(gradient)  # one flat copy
    size = min(zero.get("reduce_bucket_size", trained), 500_000_000) * gradient / max(1, trained)
    return size * (2 if zero.get("overlap_comm", stage == 3) else 1)


# ---- the command -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lavis-lstp estimate", description=__doc__.splitlines()[0])
    parser.add_argument("--cfg-path", required=True, help="YAML file, or a recipe such as projects/lstp/vicuna_ft.yaml")
    parser.add_argument("--options", nargs="+", action="extend", default=[], metavar="A.B=C", help="as for lavis.train")
    parser.add_argument("--gpus", type=int, default=1, help="processes, over all nodes")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a device; by default of the one that is here")
    parser.add_argument(
        "--prompt-tokens", type=int, help="of the longest prompts; by default as many as the model takes"
    )
    parser.add_argument("--answer-tokens", type=int, default=64, help="of the longest answers (default 64)")
    parser.add_argument("--price-in", type=float, help="of a million tokens, for backbone.source=endpoint")
    parser.add_argument("--price-out", type=float, help="the same of answers")
    args = parser.parse_args(argv)
    if args.gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, got {args.gpus}")
    cfg = _config(args)
    if (cfg.model_cfg.get("backbone") or {}).get("source") == "endpoint":
        print(printable(of_endpoint(cfg, args)))
        return 0
    estimate, facts = of_recipe(cfg, args)
    on_gpu = args.memory is not None or torch.cuda.is_available()
    there = args.memory * GIB if args.memory else _memory_here()
    needed = estimate.total + (CONTEXT if on_gpu else 0)
    print(printable(str(facts)))
    for name, value in asdict(estimate).items():
        print(f"  {name:<14}{_size(value):>12}")
    print(f"  {'total':<14}{_size(estimate.total):>12}  in each process, at the fullest moment of a step")
    beside = f" with {_size(CONTEXT)} for CUDA itself" if on_gpu else ""
    print(f"{'fits' if needed <= there else 'does not fit'}: {_size(needed)}{beside}, there are {_size(there)}")
    return 0 if needed <= there else 1


def _config(args: argparse.Namespace) -> Any:
    from lavis_lstp import register
    from lavis_lstp.config import Config

    register()
    return Config(args)


def of_endpoint(cfg: Any, args: argparse.Namespace) -> str:
    """Return one line on what a server is asked to evaluate all questions, as if none had been answered before."""
    from lavis.tasks import setup_task

    from lavis_lstp.endpoint import CHARACTERS_PER_TOKEN, cost_line

    model, run = cfg.model_cfg, cfg.run_cfg
    built = setup_task(cfg).build_datasets(cfg)
    rows = [row for own in built.values() for split in run.test_splits if split in own for row in own[split].annotation]
    texts = sum(len(row["question"]) + sum(map(len, row.get("options") or ())) + len(model.prompt) for row in rows)
    chosen = model.selector
    most = chosen.most_selected if chosen.num_selected == AUTO else chosen.num_selected
    shown = sum(most if "video" in row else "image" in row for row in rows)
    tokens_in = texts // CHARACTERS_PER_TOKEN + shown * TOKENS_PER_FRAME
    tokens_out = len(rows) * (run.get("max_len") or model.generation.max_new_tokens)
    cost = cost_line(tokens_in, tokens_out, args.price_in, args.price_out)
    return (
        f"{model.backbone.weights}: {len(rows)} questions with {shown} frames; at most {cost} ({TOKENS_PER_FRAME} a "
        "frame; answers that are kept cost nothing)"
    )


def of_recipe(cfg: Any, args: argparse.Namespace) -> tuple[Estimate, str]:
    """The estimate for command line arguments, and a line on what it is for."""
    from lavis_lstp.config.run import RunSettings
    from lavis_lstp.runners.deepspeed import config as deepspeed_config
    from lavis_lstp.runners.deepspeed.engine import import_deepspeed

    run = cfg.to_dict()["run"]
    if run["runner"] == "runner_deepspeed":
        import_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # it reads its configuration
        given = deepspeed_config.load(run.get("deepspeed") or {})
        settings = deepspeed_config.settings_with(run, given)
        deepspeed = deepspeed_config.complete(given, settings, args.gpus)
        kind = f"ZeRO stage {deepspeed['zero_optimization'].get('stage', 0)}"
    else:
        settings, deepspeed, kind = RunSettings.from_config(run), None, run["runner"]
    model = build_without_memory(cfg.model_cfg)
    frames = max(int(section.get("num_frames") or 1) for section in cfg.datasets_cfg.values())
    tokens = args.prompt_tokens or cfg.model_cfg.backbone.max_text_tokens
    lengths = {"frames": frames, "prompt_tokens": tokens, "answer_tokens": args.answer_tokens}
    samples = example(model, batch=settings.batch_size_train, **lengths)
    options = {"precision": settings.precision, "accumulate": settings.accum_grad_iters, "deepspeed": deepspeed}
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or k) for k in (1, 0))
    facts = (
        f"{args.cfg_path}, {kind}, {args.gpus} process{'es' if args.gpus > 1 else ''}, {settings.precision}, batch "
        f"{settings.batch_size_train}, prompts of {tokens} tokens: {trained:,} of {total:,} parameters are trained"
    )
    return divide(model, samples, processes=args.gpus, **options), facts


def _memory_here() -> float:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / MIB:.1f} MiB"
