"""What only a CUDA device can show; skipped, with the reason, where there is none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from test_lstp import batch, model_config

from lavis_lstp.host import launch
from lavis_lstp.models.lstp import LSTP
from lavis_lstp.models.where.flow import build_flow
from lavis_lstp.runners.engine import autocast

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "full_size.py"
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
FULL_SIZE_GIB = 70


def full_size():
    spec = importlib.util.spec_from_file_location("full_size", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_full_size_run_at_tiny_size():
    """The script that measures 7B on a GPU, so that it does not fail there for a reason that shows anywhere."""
    found = full_size().main(["--model", "lstp_tiny", "--device", "cpu", "--frames", "6"])
    assert found["samples"] == 2 and len(found["losses"]) == 2 and found["losses"][1] < found["losses"][0]
    assert set(found["stages"]) == {"build", "first_step", "step", "answer"}
    assert sum(found["trained"].values()) > 0


@gpu
@needs_cuda
@pytest.mark.parametrize("language", ["llama", "t5"])
def test_cuda_agrees_with_the_cpu_and_bf16_with_fp32(language):
    model = LSTP.from_config(model_config("instructblip", language)).eval()
    samples = batch()
    with torch.no_grad():
        cpu = model(samples)["loss"].item()
        model = model.cuda()
        fp32 = model(samples)["loss"].item()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            bf16 = model(samples)["loss"].item()
    assert fp32 == pytest.approx(cpu, rel=1e-4)
    assert bf16 == pytest.approx(fp32, rel=2e-2)


@gpu
@needs_cuda
@pytest.mark.parametrize("name", ["raft_small", "raft_large"])
def test_raft_agrees_with_the_cpu_however_many_pairs_go_together(name):
    frames = torch.randint(0, 256, (1, 5, 3, 128, 128), dtype=torch.uint8)
    flow = build_flow(name, weights="checkpoint", iterations=6, pairs_at_once=4)
    cpu = flow(frames)
    flow.cuda()
    together = flow(frames.cuda()).cpu()
    flow.estimator.pairs_at_once = 1
    alone = flow(frames.cuda()).cpu()
    largest = cpu.abs().max()
    assert (together - cpu).abs().max() < 1e-4 * largest and (alone - together).abs().max() < 1e-4 * largest


@gpu
@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_repeat_to_the_bit(precision):
    """As a run starts: without its settings, fp32 attention adds up in another order each time."""
    launch.seed_processes(0)
    parts = ["sampler", "vision", "qformer", "query_tokens", "projection", "language_model"]
    model = LSTP.from_config(model_config(train=parts, losses=["lm", "span"])).cuda().eval()
    found = []
    try:
        for _ in range(5):
            model.zero_grad(set_to_none=True)
            with autocast(torch.device("cuda"), precision):
                loss = model(batch())["loss"]
            loss.backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    finally:
        torch.use_deterministic_algorithms(False)
    differing = {name for grads in found[1:] for name, grad in grads.items() if not torch.equal(grad, found[0][name])}
    assert found[0] and not differing


@gpu
@needs_cuda
@pytest.mark.slow
def test_vicuna_ft_at_full_size():
    """Random weights of the Vicuna-7B shape: two steps of the recipe, one answer."""
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    if memory < FULL_SIZE_GIB:
        pytest.skip(f"needs {FULL_SIZE_GIB} GiB of GPU memory, there are {memory:.0f}")
    found = full_size().main([])
    assert found["parameters"] > 7.6e9  # the recipe takes given spans, so it has no sampler
    assert all(loss == loss and loss < 50 for loss in found["losses"])
