"""device.py: names of devices, autocast, and the speed of a clock that is set."""
import math
import re
from itertools import count

import pytest
import torch
from conftest import StandIn

from kronygpt import device
from kronygpt.configurator import UserError


def test_a_named_device_is_that_device():
    assert device.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("has_cuda, default", [(False, "cpu"), (True, "cuda")])
def test_the_default_is_cuda_where_available_else_the_cpu(has_cuda, default, monkeypatch):
    asked = []

    def ones(size, device):
        asked.append(device)
        return torch.zeros(size)

    cuda = StandIn(torch.cuda, is_available=lambda: has_cuda)
    monkeypatch.setattr(device, "torch", StandIn(torch, cuda=cuda, ones=ones))
    assert device.pick_device() == torch.device(default) and asked == [torch.device(default)]


@pytest.mark.parametrize("name", ["nonsense", "cpu:x", "cuda:99", "cuda:-2", "hip", "xpu:99", "meta", "meta:0", "hpu",
                                  "vulkan", "privateuseone", "cpu:99999999999999999999"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(UserError, match=re.escape(f"there is no device '{name}' here")) as caught:
        device.pick_device(name)
    assert caught.value.status == 2


def test_what_no_memory_holds_is_one_line_however_large():
    for n_bytes in 2**70, 10**400, 10**5000:
        with pytest.raises(UserError, match=r"a model takes [\d,]+ GiB or more, and cpu has \d+ GiB"):
            device.check_memory(n_bytes, torch.device("cpu"), "a model")


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


@pytest.mark.parametrize("dtype", ["float64", "int8", "", "half"])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(UserError, match=f"--dtype is float32, bfloat16 or float16, not {dtype}"):
        device.autocast_to(torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seconds, order", [
    (device.LONG_ENOUGH / 4, 512),  # fast: the largest matrices are the measure
    (device.LONG_ENOUGH * 2, 256),  # slow: the first ones take long enough
])
def test_flops_are_two_per_multiply_add_over_the_seconds_of_a_product(seconds, order, dtype, monkeypatch):
    clock = count()  # every product takes one tick
    monkeypatch.setattr(device, "time", StandIn(device.time, perf_counter=lambda: next(clock) * seconds))
    monkeypatch.setattr(device, "LARGEST_PRODUCT", {"cpu": 512})
    assert device.matmul_flops.__wrapped__(torch.device("cpu"), dtype) == pytest.approx(2 * order**3 / seconds)


def test_the_speed_of_this_machine_is_finite(monkeypatch):
    monkeypatch.setattr(device, "LARGEST_PRODUCT", {"cpu": 256})
    assert 1e6 < device.matmul_flops.__wrapped__(torch.device("cpu"), "float32") < math.inf
