"""device.py: names of devices, their defaults on machines unlike this one, autocast, and the clock of a run."""
import sys
import time

import pytest
import torch
from conftest import StandIn
from test_train import log_of, run_train

from kronygpt import checkpoint, device

CUDA, CPU, MPS = map(torch.device, ("cuda", "cpu", "mps"))


def machine(monkeypatch, cuda=False, mps=False, has_bfloat16=True):
    """A machine with such devices, for device.py; returns a list of the precisions that it sets."""
    precisions = []
    stand_in = StandIn(
        torch, ones=lambda size, device: torch.zeros(size), set_float32_matmul_precision=precisions.append,
        cuda=StandIn(torch.cuda, is_available=lambda: cuda,
                     is_bf16_supported=lambda including_emulation=True: has_bfloat16 or including_emulation),
        backends=StandIn(torch.backends, mps=StandIn(torch.backends.mps, is_available=lambda: mps)))
    monkeypatch.setattr(device, "torch", stand_in)
    return precisions


@pytest.mark.parametrize("here, name, dtype", [
    (dict(cuda=True, mps=True), "cuda", "bfloat16"), (dict(cuda=True, has_bfloat16=False), "cuda", "float16"),
    (dict(mps=True), "mps", "float32"), (dict(), "cpu", "float32")])
def test_the_default_device_and_dtype(here, name, dtype, monkeypatch):
    precisions = machine(monkeypatch, **here)
    picked = device.pick_device()
    assert picked.type == name and device.default_dtype(picked) == dtype
    assert precisions == ["high"] * (name == "cuda")  # TF32


@pytest.mark.parametrize("name", ["nonsense", "cpu:x", "cuda:99", "xpu:99", "meta", "vulkan"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises((RuntimeError, AssertionError)):
        device.pick_device(name)


def test_float64_is_on_the_cpu_where_the_device_has_none():
    assert device.float64_device(MPS) == CPU and device.float64_device(CUDA) == CUDA
    assert device.float64(torch.ones(2)).dtype == torch.float64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_autocast_multiplies_in_the_named_dtype(dtype):
    a = torch.ones(2, 2)
    with device.autocast_to(CPU, dtype):
        assert (a @ a).dtype == getattr(torch, dtype)
        assert torch.is_autocast_enabled("cpu") == (dtype != "float32")


def test_a_line_of_progress_counts_tokens_and_operations_by_the_clock(tokens, monkeypatch):
    now = iter(range(0, 1000, 2))  # two seconds pass from one look at it to the next
    monkeypatch.setitem(sys.modules, "time", StandIn(time, perf_counter=lambda: next(now)))
    said = run_train("--max_iters=3")
    *_, entry, _ = log_of("out")
    assert entry["step"] == 3 and entry["tokens_per_second"] == 128 / 2
    model, _ = checkpoint.load("out/ckpt.pt")
    assert entry["tflops"] == pytest.approx(64 * model.flops_per_token(16) / 1e12)
    assert f" | 64 tokens/s | {entry['tflops']:.3g} TFLOP/s | 0:00:00 left\n" in said.stdout
