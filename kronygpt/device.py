"""Torch devices and dtypes, and the processes of a run."""
import ctypes
import os
import signal
import sys

import torch
import torch.distributed as dist

from kronygpt.configurator import SIGNALLED, check_choice

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt()


def pick_device(name=""):
    """Return the named torch.device; by default CUDA if available, else Apple's mps, else the CPU. Where there is no such
    device, torch says so now. On CUDA, float32 products use TF32 from then on."""
    default = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name or default)
    torch.ones(1, device=device).item()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


def glibc(name, *args):
    """Call a function of glibc, where the process runs on it."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), name):
        getattr(ctypes.CDLL(None), name)(*args)


def keep_freed_memory(device):
    """Let memory that is freed stay with this process, on a CPU with glibc: else each large tensor goes back to the system,
    and the next one waits for its pages."""
    if device.type == "cpu":
        glibc("mallopt", M_MMAP_MAX, 0)
        glibc("mallopt", M_TRIM_THRESHOLD, 2**31 - 1)


def default_dtype(device):
    """The fastest dtype to train in: "bfloat16" on a GPU with units for it, "float16" on other CUDA GPUs, else "float32"."""
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def autocast_to(device, dtype):
    """The autocast context on a torch.device for "float32" (none), "bfloat16" or "float16"; UserError for another dtype."""
    check_choice(dict(dtype=dtype), "dtype", "float32", "bfloat16", "float16")
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")


def float64_device(device):
    """The torch.device for float64 sums over tensors on a device: the CPU where the device has no float64 (mps)."""
    return torch.device("cpu") if device.type == "mps" else device


def float64(tensor):
    """A tensor in float64, on its float64_device."""
    return tensor.to(float64_device(tensor.device)).double()


class Processes:
    """This process among those that torchrun started: rank, world_size, and its torch.device, named as in pick_device."""

    def __init__(self, name):
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.signal = 0  # the number of the signal that this process was sent
        if self.world_size > 1 and torch.cuda.is_available() and torch.device(name or "cuda").type == "cuda":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(name)  # before anything takes memory of the first GPU
        self.device = pick_device(name)
        keep_freed_memory(self.device)
        if self.world_size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        self.rank = dist.get_rank() if self.world_size > 1 else 0
        self.is_main = self.rank == 0

    def mean(self, total, count):
        """The sum of all processes' totals (numbers or tensors) over that of their counts."""
        total = float64(torch.as_tensor(total))
        pair = torch.stack((total, torch.full_like(total, count)))
        if self.world_size > 1:
            dist.all_reduce(pair)
        return (pair[0] / pair[1]).item()

    def on_signal(self, number, frame):
        """Ask for a stop; a second signal ends this process at once."""
        self.signal = int(number)
        signal.signal(number, signal.SIG_DFL)

    def stop_signal(self):
        """The number of the signal that any process was sent, or 0. All of them get it, and stop after the same step."""
        number = torch.tensor(self.signal)
        if self.world_size > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return number.item()

    def leave(self, stop):
        """End this process: with the status of the signal that stopped it, or 0."""
        status = SIGNALLED + stop if stop else 0
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1))  # torchrun ends the others when the first one exits with a status
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(status)  # gloo's threads outlive the group, and now and then abort a process that ends in the usual way
        sys.exit(status)
