"""The engine of `runner_deepspeed`: DeepSpeed's ZeRO stages behind the methods of `TorchEngine`.

In: the model and a complete DeepSpeed configuration (`deepspeed_config`). Out: the same numbers as `TorchEngine`, with
gradients, optimizer states and at stage 3 the weights themselves divided among the processes.

Whatever is done with the weights goes through `Door.forward`, in training and in evaluation: stage 3 collects a
weight when the module that holds it is called, and one that is read elsewhere (query tokens) only inside of a forward.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lavis_lstp import distributed
from lavis_lstp.config.run import check_deepspeed_version
from lavis_lstp.errors import ConfigError
from lavis_lstp.runners import checkpoint
from lavis_lstp.runners.deepspeed.state import OptimizerState
from lavis_lstp.runners.engine import OPTIMIZERS, WholeModel, autocast, digest_of, parameter_groups

log = logging.getLogger(__name__)

BUCKET = 500_000_000
"""DeepSpeed's default size of a communication buffer, in numbers: 2 GB that a small model would reserve in vain."""


def import_deepspeed(device: torch.device) -> Any:
    """The package, told to use this device and to compile nothing.

    Raises:
        ConfigError: it is not installed, or too old.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, at import
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"run.runner=runner_deepspeed needs DeepSpeed ({error}); pip install 'lavis-lstp[deepspeed]'"
        ) from error
    check_deepspeed_version(deepspeed.__version__)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if device.type == "cpu":  # a faster all-reduce, at the price of a compiler and a minute of it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Door(nn.Module):
    """The model as a callable that is given what to do with it, so that DeepSpeed's hooks are around all of it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[nn.Module], Any]) -> Any:
        return compute(self.model)


def set_aside(model: nn.Module) -> None:
    """Makes plain attributes of the modules that a model names in KEPT_WHOLE: DeepSpeed neither casts nor divides them.

    For good: at stage 3 it looks for its marks on every weight below the model, after each pass.
    """
    for name in getattr(model, "KEPT_WHOLE", ()):
        parent, _, own = name.rpartition(".")
        owner = model.get_submodule(parent)
        if owner._modules.get(own) is not None:
            owner.__dict__[own] = owner._modules.pop(own)


class DividedModel(WholeModel):
    """A model in DeepSpeed's hands: at stage 3 each process holds a part of every weight. Without an optimizer, so for
    evaluation alone.

    Args:
        model: on its device, the same in each process or about to be: DeepSpeed broadcasts rank 0's.
        config: complete, of `deepspeed_config.complete`.
        precision: "fp32" or "bf16", as in the configuration.
        optimizer: on the model's weights.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        *,
        device: torch.device,
        precision: str = "fp32",
        optimizer: torch.optim.Optimizer | None = None,
    ):
        super().__init__(model)
        deepspeed = import_deepspeed(device)
        self.device = device
        self.precision = precision
        self.optimizer = optimizer
        self.trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.stage = config["zero_optimization"].get("stage", 0)
        distributed.ensure_group(device)
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
        deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
        set_aside(model)
        self.linear = functional.linear
        with self._linear():
            self.deepspeed, *_ = deepspeed.initialize(model=Door(model), optimizer=optimizer, config=dict(config))
            self.linear = functional.linear
        self.model = self.deepspeed
        self.in_step = self.stage == 3 and distributed.world_size() > 1
        if self.in_step:
            generate_in_step(model)

    def apply(self, compute: Callable[[nn.Module], Any]) -> Any:
        def inside(model: nn.Module) -> Any:
            with autocast(self.device, self.precision):
                return compute(model)

        with self._linear():
            return self.deepspeed(inside)

    @contextlib.contextmanager
    def _linear(self) -> Iterator[None]:
        """Inside, PyTorch computes `linear` as DeepSpeed wants it for this model; afterwards as before.

        At stage 3 DeepSpeed replaces `torch.nn.functional.linear` in the whole process and never puts it back: any
        other model would compute, and round, in another way than in a process that never used stage 3.
        """
        before, functional.linear = functional.linear, self.linear
        try:
            yield
        finally:
            functional.linear = before

    @contextlib.contextmanager
    def _whole(self, parameter: torch.Tensor | None, *, change: bool = False) -> Iterator[None]:
        """One weight in one piece; with `change`, what rank 0 makes of it is what all will have."""
        if not hasattr(parameter, "ds_id"):
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if change else None):
            yield

    def load_trained_state(self, state: Mapping[str, torch.Tensor], source: object) -> None:
        """See `checkpoint.load_trained_state`."""
        parameters = dict(self.bare_model.named_parameters(remove_duplicate=False))
        expected = checkpoint.trained_state(self.bare_model)
        shapes = {name: getattr(parameters.get(name), "ds_shape", t.shape) for name, t in expected.items()}
        checkpoint.check_trained_state(shapes, state, source)
        with torch.no_grad():
            for name, tensor in expected.items():
                parameter = parameters.get(name)
                with self._whole(parameter, change=True):
                    if parameter is None or not hasattr(parameter, "ds_id") or distributed.is_main():
                        (tensor if parameter is None else parameter.data).copy_(state[name])
        log.info("loaded %d trained tensors from %s", len(expected), source)

    def weights_digest(self) -> str:
        """Returns that of one process: parameters are gathered one at a time, without what pads a rank's part."""
        parameters = dict(self.bare_model.named_parameters(remove_duplicate=False))

        def state() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in sorted(self.bare_model.state_dict().items()):
                parameter = parameters.get(name)
                with self._whole(parameter):
                    yield name, tensor if parameter is None else parameter.data

        return digest_of(state(), self.trained)


class DeepSpeedEngine(DividedModel):
    """Adam or AdamW under ZeRO.

    Args:
        optimizer, lr, weight_decay, lr_scale, betas, max_grad_norm: as for `TorchEngine`.
    """

    needs_every_batch = True

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        *,
        device: torch.device,
        precision: str = "fp32",
        optimizer: str = "adamw",
        lr: float,
        weight_decay: float = 0.05,
        lr_scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        max_grad_norm: float | None = None,
    ):
        import_deepspeed(device)
        _, groups = parameter_groups(model, weight_decay, lr_scale)
        names = {id(p): name for name, p in model.named_parameters()}
        self.parameters = {names[id(p)]: p for group in groups for p in group["params"]}
        self.max_grad_norm = max_grad_norm
        zero = {**config["zero_optimization"]}
        trained = sum(p.numel() for p in self.parameters.values())
        for key in ("reduce_bucket_size", "allgather_bucket_size"):
            zero.setdefault(key, min(BUCKET, trained + trained % 2))  # DeepSpeed wants an even number
        config = {**config, "zero_optimization": zero}
        self.own_clipping = zero.get("stage", 0) == 0 and precision == "fp32"  # there DeepSpeed tells no norm
        if self.own_clipping:
            config["gradient_clipping"] = 0.0
        on_host = device.type == "cuda" and (zero.get("offload_optimizer") or {}).get("device") == "cpu"
        made = make_optimizer(optimizer, groups, lr, betas, on_host=on_host)
        super().__init__(model, config, device=device, precision=precision, optimizer=made)
        self.state = OptimizerState(self.deepspeed, self.stage)

    def train_mode(self) -> None:
        self.model.train()

    def accumulate(
        self, compute: Callable[[nn.Module], Mapping[str, torch.Tensor]], *, weight: float, last: bool
    ) -> dict[str, torch.Tensor]:
        """See `TorchEngine.accumulate`."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        losses = self.apply(compute)
        with self._linear():  # checkpointed activations are computed again
            self.deepspeed.backward(losses["loss"] * weight, scale_wrt_gas=False)
        return {name: loss.detach() for name, loss in losses.items()}

    def clip(self) -> torch.Tensor:
        """The gradient's global norm, []; where it is finite, DeepSpeed has also clipped and made the update."""
        if self.own_clipping:
            limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
            norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
            if torch.isfinite(norm):
                self.deepspeed.step()
            return norm
        self.deepspeed.step()
        return torch.as_tensor(self.deepspeed.get_global_grad_norm(), dtype=torch.float32, device=self.device)

    def step(self) -> None:
        """Nothing is left to do: see `clip`."""

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Trained weights on rank 0, one collected after the other; a collective. Elsewhere nothing."""
        parameters = dict(self.bare_model.named_parameters(remove_duplicate=False))
        whole = {}
        for name, tensor in checkpoint.trained_state(self.bare_model).items():
            parameter = parameters.get(name)
            with self._whole(parameter):
                if distributed.is_main():
                    value = tensor if parameter is None else parameter
                    whole[name] = value.detach().to("cpu", copy=True)
        return whole

    def load_trained_state(self, state: Mapping[str, torch.Tensor], source: object) -> None:
        """Weights, and the optimizer's own copies of them."""
        super().load_trained_state(state, source)
        for name, parameter in self.parameters.items():
            self.state.set(parameter, None, state[name].flatten().float())

    def snapshot(self) -> dict[str, Any]:
        """This rank's share of the optimizer's state; a collective."""
        return self.state.share(self.parameters, self.precision)

    def save(self, snapshot: dict[str, Any], folder: Path) -> None:
        """Write it as one file of safetensors."""
        self.state.write(snapshot, folder)

    def load(self, folder: Path) -> None:
        """Read what any number of processes wrote at any stage.

        Raises:
            WeightsError: the files are another runner's, or belong to other weights.
        """
        self.state.read(folder, self.parameters, self.precision)


def make_optimizer(
    name: str, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], *, on_host: bool
) -> torch.optim.Optimizer:
    """torch's class, or DeepSpeed's compiled one where the states lie in host memory beside a GPU."""
    if not on_host:
        return OPTIMIZERS[name](groups, lr=lr, betas=betas)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, lr=lr, betas=betas, adamw_mode=name == "adamw")


def generate_in_step(model: nn.Module) -> None:
    """Let each rank generate until all have finished: each needs the others' part of the weights for each token."""
    from transformers import GenerationMixin

    for module in model.modules():
        if isinstance(module, GenerationMixin):
            module.generate = functools.partial(module.generate, synced_gpus=True)
