"""device.py: names of devices, autocast, data sheets, and what several processes need."""
import re

import pytest
import torch
from conftest import StandIn
from test_train import log_of, run_train, write_dataset

from kronygpt import device
from kronygpt.configurator import UserError

CUDA, CPU = map(torch.device, ("cuda", "cpu"))


def test_a_named_device_is_that_device():
    assert device.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("has_cuda, default", [(False, "cpu"), (True, "cuda")])
def test_the_default_is_cuda_where_available_with_tf32_else_the_cpu(has_cuda, default, monkeypatch):
    asked, precision = [], []

    def ones(size, device):
        asked.append(device)
        return torch.zeros(size)

    cuda = StandIn(torch.cuda, is_available=lambda: has_cuda)
    monkeypatch.setattr(device, "torch", StandIn(torch, cuda=cuda, ones=ones, set_float32_matmul_precision=precision.append))
    assert device.pick_device() == torch.device(default) and asked == [torch.device(default)]
    assert precision == ["high"] * has_cuda


@pytest.mark.parametrize("name", ["nonsense", "cpu:x", "cuda:99", "xpu:99", "meta", "vulkan", "cpu:99999999999999999999"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(UserError, match=re.escape(f"there is no device '{name}' here")) as caught:
        device.pick_device(name)
    assert caught.value.status == 2


def test_a_device_whose_memory_is_full_is_not_called_absent(monkeypatch):
    def ones(size, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(device, "torch", StandIn(torch, ones=ones))
    with pytest.raises(torch.OutOfMemoryError):
        device.pick_device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_autocast_multiplies_in_the_named_dtype(dtype):
    a = torch.ones(2, 2)
    with device.autocast_to(torch.device("cpu"), dtype):
        assert (a @ a).dtype == getattr(torch, dtype)
        assert torch.is_autocast_enabled("cpu") == (dtype != "float32")
    assert (a @ a).dtype == torch.float32


def test_another_dtype_is_refused():
    with pytest.raises(UserError, match="--dtype is float32, bfloat16 or float16, not half"):
        device.autocast_to(torch.device("cpu"), "half")


@pytest.mark.parametrize("name, has_bfloat16, dtype, sheet", [
    ("NVIDIA H100 80GB HBM3", True, "bfloat16", "2 × 989 TFLOP/s (data sheet of H100)"),
    ("Tesla T4", False, "float16", "2 × 65 TFLOP/s (data sheet of T4)"),
    ("Tesla T4", False, "bfloat16", ""),  # which it emulates
    ("AMD Instinct MI300X", True, "bfloat16", "")])
def test_mfu_is_a_share_of_the_data_sheet_where_there_is_one(name, has_bfloat16, dtype, sheet, monkeypatch):
    cuda = StandIn(torch.cuda, get_device_name=lambda device: name, is_bf16_supported=lambda **options: has_bfloat16)
    monkeypatch.setattr(device, "torch", StandIn(torch, cuda=cuda))
    speed = device.Speed(CUDA, dtype, world_size=2)
    assert str(speed) == sheet
    assert speed.mfu(speed.peak / 4 or 1e12) == (0.25 if sheet else None)


def test_a_cpu_has_no_mfu(monkeypatch):
    now = iter([0, 10, 16, 20])
    monkeypatch.setattr(device, "time", StandIn(device.time, perf_counter=lambda: next(now)))
    speed = device.Speed(CPU, "float32")
    speed.restart(100)
    assert speed.read(103) == 2 and str(speed) == "" and speed.mfu(1e9) is None


def test_the_log_of_a_cpu_has_tokens_per_second_only(workdir):
    write_dataset("tiny", 5000)
    said = run_train("--max_iters=2")
    assert "mfu" not in said.stdout and " tokens/s | 0:00:00 left\n" in said.stdout
    assert all(entry["tokens_per_second"] > 0 and "mfu" not in entry for entry in log_of("out") if "loss" in entry)
