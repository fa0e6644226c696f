"""Torch devices and dtypes, the processes of a run, and how fast a device is."""
import ctypes
import functools
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from kronygpt.configurator import UserError, check_choice, is_out_of_memory

LONG_ENOUGH = 0.02  # seconds of a matrix product that tell how fast a device is
LARGEST_PRODUCT = {"cuda": 8192, "cpu": 2048}  # order of the matrices that measure it, at most
TRIES, PAUSE = 5, 0.02  # more measurements, and seconds between them: the best is the one that nothing disturbed
LARGEST_SHOWN = 2**100  # bytes
NO_FLOAT64 = ("mps",)  # types of devices without float64
DATA_SHEETS = (  # (words of a GPU's name, dense TFLOP/s in bfloat16 or float16, in float32 by TF32 where it has that)
    ("B200", 2250, 1100), ("H200", 989, 494), ("GH200", 989, 494), ("H100 PCIe", 756, 378), ("H100 NVL", 835, 417),
    ("H100", 989, 494), ("H800", 989, 494), ("A100", 312, 156), ("A800", 312, 156), ("A40", 149.7, 74.8), ("A30", 165, 82),
    ("A10", 125, 62.5), ("A10G", 70, 35), ("L40S", 362, 183), ("L40", 181, 90.5), ("L4", 121, 60), ("T4", 65, 8.1),
    ("V100 PCIE", 112, 14), ("V100", 125, 15.7), ("RTX 6000 Ada", 364, 182), ("RTX A6000", 154.8, 77.4),
    ("RTX 5090", 209.5, 104.8), ("RTX 4090", 165.2, 82.6), ("RTX 4080", 97.5, 48.7), ("RTX 3090 Ti", 80, 40),
    ("RTX 3090", 71, 35.6), ("RTX 3080", 59.5, 29.8), ("RTX 2080 Ti", 53.8, 13.4),
)
VARIANTS = {"mig", "laptop", "ti", "super", "d", "max"}  # words that make another GPU of one in the table


def pick_device(name=""):
    """Return the named torch.device; by default CUDA if available, else Apple's mps, else the CPU.

    Raises:
        UserError: no such device here.
    """
    try:
        device = torch.device(name or default_device())
        torch.ones(1, device=device).item()  # a device such as meta holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"there is no device {name!r} here") from None
    return device


def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_dtype(device):
    """The fastest dtype to train in: "bfloat16" on a GPU with units for it, "float16" on other CUDA GPUs, else "float32"."""
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def autocast_to(device, dtype):
    """The autocast context on a torch.device for "float32" (none), "bfloat16" or "float16".

    Raises:
        UserError: another dtype.
    """
    check_choice(dict(dtype=dtype), "dtype", "float32", "bfloat16", "float16")
    is_half = dtype != "float32"
    return torch.autocast(device.type, dtype=getattr(torch, dtype) if is_half else torch.bfloat16, enabled=is_half)


def float64_device(device):
    """The torch.device for float64 sums over tensors on a device: the CPU where the device has no float64 (mps)."""
    return torch.device("cpu") if device.type in NO_FLOAT64 else device


def float64(tensor):
    """A tensor in float64, on its float64_device."""
    return tensor.to(float64_device(tensor.device)).double()


def gradient_scaler(device, dtype, state=None):
    """The GradScaler of a run, which keeps small gradients from vanishing in float16; in another dtype it does nothing.

    Args:
        device: a torch.device.
        dtype: of the autocast, a name.
        state: its state dict from a checkpoint, or None.

    Raises:
        UserError: that is no state of a GradScaler.
    """
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    if state and scaler.is_enabled():
        types = {name: type(value) for name, value in scaler.state_dict().items()}
        if not isinstance(state, dict) or {name: type(value) for name, value in state.items()} != types:
            raise UserError("the checkpoint's gradient scaler is damaged: resume with --dtype=float32, or start from its "
                            "weights")
        scaler.load_state_dict(state)
    return scaler


@functools.cache
def matmul_flops(device, dtype):
    """Floating point operations per second of a large matrix product on a device: the best of several short measurements,
    so that a machine that is busy for a moment does not count."""
    def seconds():
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        return time.perf_counter() - start

    largest = LARGEST_PRODUCT.get(device.type, LARGEST_PRODUCT["cpu"])
    n = 256
    while True:
        a = torch.ones(n, n, device=device, dtype=getattr(torch, dtype))
        best = min(seconds() for _ in range(3))
        if n == largest or best > LONG_ENOUGH:  # bfloat16 at 2048 takes minutes on some CPUs
            break
        n *= 2
    for _ in range(TRIES):
        time.sleep(PAUSE)
        best = min(best, seconds())
    return 2 * n**3 / best


def data_sheet(gpu_name, dtype):
    """What a vendor says of a GPU.

    Args:
        gpu_name: as torch.cuda.get_device_name gives it.
        dtype: "float32", "bfloat16" or "float16".

    Returns:
        (name, operations per second), or None where the table does not have it.
    """
    words = set(re.split(r"\W+", gpu_name.lower()))
    for name, half, single in DATA_SHEETS:
        own = set(name.lower().split())
        if own <= words and not (words - own) & VARIANTS:
            return name, 1e12 * (single if dtype == "float32" else half)
    return None


def memory_of(device):
    """Bytes of memory of a torch.device; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def check_memory(n_bytes, device, what):
    """Raise UserError where something would take more memory than a device has: where allocation does not fail, the system
    kills the process."""
    if n_bytes > (there := memory_of(device)):
        n_bytes = min(n_bytes, LARGEST_SHOWN)
        raise UserError(f"{what} takes {n_bytes / 2**30:,.0f} GiB or more, and {device} has {there / 2**30:,.0f} GiB",
                        status=1)


def peak_memory(function, device):
    """Bytes that a call allocates at its peak, on top of those before it; None on systems that do not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")  # Linux
    if not status.exists():
        return None

    def read(field):
        return 1024 * int(re.search(rf"{field}:\s*(\d+)", status.read_text())[1])

    try:
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system: it would hide allocations of the call
        Path("/proc/self/clear_refs").write_text("5")  # restart the peak
    except (AttributeError, OSError):  # another C library than glibc, or a container that forbids it
        return None
    before = read("VmRSS")
    function()
    return read("VmHWM") - before


class Speed:
    """How fast a run is: tokens per second, and mfu, the share of the peak of its devices.

    The peak is that of the GPU's data sheet, or else measured. A run that is faster raises it, so that mfu is at most 1.

    Args:
        device: a torch.device.
        dtype: of the products, a name.
        world_size: number of such devices.
        step: steps done.
    """

    def __init__(self, device, dtype, world_size=1, step=0):
        known = device.type == "cuda" and data_sheet(torch.cuda.get_device_name(device), dtype)
        if dtype == "bfloat16" and default_dtype(device) == "float16":
            known = None  # emulated
        self.source = f"data sheet of {known[0]}" if known else "measured"
        self.peak, self.world_size = known[1] if known else matmul_flops(device, dtype), world_size
        self.restart(step)

    def __str__(self):
        unit, size = ("TFLOP/s", 1e12) if self.peak >= 1e12 else ("GFLOP/s", 1e9)
        return f"{f'{self.world_size} × ' if self.world_size > 1 else ''}{self.peak / size:,.3g} {unit} ({self.source})"

    def mfu(self, flops):
        """The share of the peak that a rate of floating point operations per second, on all devices, is."""
        if flops > self.peak * self.world_size:
            self.peak, self.source = flops / self.world_size, "measured"
        return flops / (self.peak * self.world_size)

    def restart(self, step):
        """Start the clock, at a number of steps done."""
        self.started, self.first_step = time.perf_counter(), step

    def read(self, step, tokens_per_step, flops_per_token):
        """(tokens per second, mfu, seconds per step) since the clock was started, which starts again."""
        seconds = (time.perf_counter() - self.started) / (step - self.first_step)
        self.restart(step)
        return tokens_per_step / seconds, self.mfu(tokens_per_step / seconds * flops_per_token), seconds


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
            if self.device.type == "mps" and not name:
                self.device = pick_device("cpu")
            if self.device.type not in ("cuda", "cpu"):
                raise UserError(f"{self.world_size} processes train on CUDA or the CPU, not on {self.device.type}: "
                                "start one process, or give --device=cpu")
            if self.device.type == "cuda":
                self.device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
                torch.cuda.set_device(self.device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def mean(self, total, count):
        """The sum of all processes' totals (tensors) over that of their counts."""
        total = float64(total)
        pair = torch.stack((total, torch.tensor(float(count), device=total.device, dtype=torch.double)))
        if self.world_size > 1:
            dist.all_reduce(pair)
        return (pair[0] / pair[1]).item()

    def catch_signals(self):
        """Let SIGTERM, SIGINT and Windows' SIGBREAK ask for a stop; a second one ends this process at once."""
        for name in ("SIGTERM", "SIGINT", "SIGBREAK"):
            if number := getattr(signal, name, None):  # not every system has all of them
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
