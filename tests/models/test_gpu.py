"""What only a CUDA device can show; skipped, with the reason, where there is none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from test_lstp import batch, model_config

from lavis_lstp.models.lstp import LSTP

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
@pytest.mark.slow
def test_vicuna_ft_at_full_size():
    """Random weights of the Vicuna-7B shape: two steps of the recipe, one answer."""
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    if memory < FULL_SIZE_GIB:
        pytest.skip(f"needs {FULL_SIZE_GIB} GiB of GPU memory, there are {memory:.0f}")
    found = full_size().main([])
    assert found["parameters"] > 7.6e9  # the recipe takes given spans, so it has no sampler
    assert all(loss == loss and loss < 50 for loss in found["losses"])
