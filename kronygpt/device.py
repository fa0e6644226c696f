"""Torch devices and dtypes, and the processes of a run."""
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from kronygpt.configurator import ENDING, SIGNALLED, UserError, check_choice

NO_FLOAT64 = ("mps",)  # types of devices without float64
STOP_SIGNALS = ("SIGINT", "SIGBREAK", *ENDING)  # they ask a run to stop; SIGBREAK is Windows'


def pick_device(name=""):
    """Return the named torch.device; by default CUDA if available, else Apple's mps, else the CPU. Where there is no such
    device, torch says so now. On CUDA, float32 products use TF32 from then on."""
    default = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name or default)
    torch.ones(1, device=device).item()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


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
    """The GradScaler of a run on a torch.device, which keeps small gradients from vanishing in float16, and in another dtype
    does nothing; state: its state dict from a checkpoint, None or {} for a new one."""
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    if state and scaler.is_enabled():
        scaler.load_state_dict(state)
    return scaler


class Clock:
    """Measures the seconds per step, from a number of steps done on."""

    def __init__(self, step):
        self.restart(step)

    def restart(self, step):
        self.started, self.first_step = time.perf_counter(), step

    def read(self, step):
        """Seconds per step since the clock was started, which starts again."""
        seconds = (time.perf_counter() - self.started) / (step - self.first_step)
        self.restart(step)
        return seconds


class Processes:
    """This process among those that torchrun started: rank, world_size, and its torch.device.

    Args:
        name: of the device, as in pick_device.

    Raises:
        UserError: the environment contradicts itself, or several processes cannot use the device.
    """

    def __init__(self, name):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.signal = 0  # the number of the signal that this process was sent
        if self.rank >= self.world_size:  # no process would write, or it would wait for others forever
            raise UserError(f"the environment has RANK={self.rank} and WORLD_SIZE={self.world_size}: start several "
                            "processes with torchrun, or unset both for one")
        self.device = pick_device(name)
        if self.world_size > 1:
            if self.device.type not in ("cuda", "cpu"):
                raise UserError(f"{self.world_size} processes train on CUDA or the CPU, not on {self.device.type}: "
                                "start one process, or give --device=cpu")
            if self.device.type == "cuda":
                self.device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
                torch.cuda.set_device(self.device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def mean(self, total, count):
        """The sum of all processes' totals (numbers or tensors) over that of their counts."""
        total = float64(torch.as_tensor(total))
        pair = torch.stack((total, torch.full_like(total, count)))
        if self.world_size > 1:
            dist.all_reduce(pair)
        return (pair[0] / pair[1]).item()

    def catch_signals(self):
        """Let the STOP_SIGNALS that this system has ask for a stop, unless they are ignored, as nohup ignores SIGHUP. A
        second one ends this process at once."""
        for number in (getattr(signal, name, None) for name in STOP_SIGNALS):
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.signal = int(number)
        signal.signal(number, signal.SIG_DFL)

    def stop_signal(self):
        """The number of the signal that any process was sent, or 0. All of them get it, and stop after the same step."""
        number = torch.tensor(self.signal)
        if self.world_size > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return number.item()

    def leave(self, stop=0):
        """End this process, where a signal stopped it, with its exit status; and the process group, once all are here."""
        status = SIGNALLED + stop if stop else 0
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1))  # torchrun ends the others when the first one exits with a status
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(status)  # gloo's threads outlive the group, and now and then abort a process that ends in the usual way
        if status:
            sys.exit(status)
