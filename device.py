"""Torch devices and dtypes, the processes of a run, and how fast a device is."""
import math
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from configurator import UserError

LONG_ENOUGH = 0.02  # seconds of a matrix product that tell how fast a device is
LARGEST_PRODUCT = {"cuda": 8192, "cpu": 2048}  # order of the matrices that measure it, at most


def pick_device(name=""):
    """Return the named torch.device; by default CUDA if available, else the CPU.

    Raises:
        UserError: no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"there is no device {name!r} here") from None
    return device


def default_dtype(device):
    """"bfloat16" on a GPU that has it, else "float32"."""
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def autocast_to(device, dtype):
    """The autocast context on a torch.device for "float32" (none) or "bfloat16".

    Raises:
        UserError: another dtype.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is float32 or bfloat16, not {dtype}")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def matmul_flops(device, dtype):
    """Floating point operations per second of a large matrix product on a device: the peak that "mfu" is a share of."""
    largest = LARGEST_PRODUCT.get(device.type, LARGEST_PRODUCT["cpu"])
    n = 256
    while True:
        a = torch.ones(n, n, device=device, dtype=getattr(torch, dtype))
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - start)
        if n == largest or best > LONG_ENOUGH:  # bfloat16 at 2048 takes minutes on some CPUs
            break
        n *= 2
    return 2 * n**3 / best


class Processes:
    """This process among those that torchrun started: rank, world_size, and its torch.device.

    Args:
        name: of the device, as in pick_device.
    """

    def __init__(self, name):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.stop_signal = None  # the name of the signal that this process was sent
        self.device = pick_device(name)
        if self.world_size > 1:
            if self.device.type == "cuda":
                self.device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
                torch.cuda.set_device(self.device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def mean(self, total, count):
        """The sum of all processes' totals (tensors) over that of their counts."""
        pair = torch.stack((total.double(), torch.tensor(float(count), device=self.device, dtype=torch.double)))
        if self.world_size > 1:
            dist.all_reduce(pair)
        return (pair[0] / pair[1]).item()

    def catch_signals(self):
        """Let SIGTERM and SIGINT ask for a stop; a second one ends this process at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.stop_signal = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def must_stop(self):
        """Whether any process was asked to stop: all of them stop after the same step."""
        flag = torch.tensor(int(self.stop_signal is not None))
        if self.world_size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def leave(self):
        """End the process group, and the process with it."""
        if self.world_size > 1:
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)  # gloo's threads outlive the group, and now and then abort a process that ends in the usual way
