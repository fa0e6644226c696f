"""Machines unlike the one that runs the tests: file systems, GPUs, Apple, Windows, log pipes, and wandb without a login."""
import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import types
import warnings
from pathlib import Path

import filelock._native._unix as flock_module
import pytest
import torch
from conftest import ROOT, StandIn, run_here
from test_train import RUN, as_it_was, load, losses_of, run_train, write_dataset  # noqa: F401

from kronygpt import calibration, device, files, least_squares
from kronygpt.configurator import UserError
from model import KronyGPT

CUDA, CPU, MPS = map(torch.device, ("cuda", "cpu", "mps"))


def failing(number, only=lambda *args: True, otherwise=None):
    """A function of the operating system that answers with an error."""
    def call(*args, **kwargs):
        if only(*args):
            raise OSError(number, os.strerror(number))
        return otherwise(*args, **kwargs)

    return call


def is_folder(descriptor):
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


# file systems

@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gets_one_warning(number, workdir, monkeypatch):
    monkeypatch.setattr(flock_module, "fcntl", StandIn(fcntl, flock=failing(number)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        files.lock("out").release()
    assert [str(w.message).partition(" (")[0] for w in caught] == ["no locks in out"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV])
def test_older_checkpoints_are_copies_where_there_are_no_hard_links(number, workdir, monkeypatch):
    write_dataset("tiny", 5000)
    monkeypatch.setattr(files, "os", StandIn(os, link=failing(number)))
    run_train("--max_iters=8", "--eval_interval=2", "--keep=2")
    assert {path.name: load(path)["iter_num"] for path in Path("out").glob("ckpt*")} == {
        "ckpt_0000004.pt": 4, "ckpt_0000006.pt": 6, "ckpt.pt": 8}


def test_a_copy_that_fails_costs_neither_the_new_checkpoint_nor_the_old(workdir, monkeypatch):
    def copy_half(source, target):
        assert load(next(Path("out").glob(".ckpt.pt.*.tmp")))["iter_num"] == 4  # the new one is safe first
        target.write(source.read(10))
        raise OSError(errno.ENOSPC, "disk full")

    write_dataset("tiny", 5000)
    run_train("--max_iters=2")
    monkeypatch.setattr(files, "os", StandIn(os, link=failing(errno.EPERM)))
    monkeypatch.setattr(files, "shutil", StandIn(shutil, copyfileobj=copy_half))
    with pytest.warns(UserWarning, match="ckpt.pt is not kept as out/ckpt_0000002.pt: disk full"):
        run_train("--init_from=resume", "--max_iters=4", "--keep=2")
    assert [path.name for path in Path("out").glob("*ckpt*")] == ["ckpt.pt"]
    assert load("out/ckpt.pt")["iter_num"] == 4


@pytest.mark.parametrize("call", ["fsync", "open"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES, errno.EBADF, errno.EOPNOTSUPP])
def test_a_folder_that_cannot_be_flushed_is_no_error(call, number, workdir, monkeypatch):
    calls = dict(fsync=failing(number, only=is_folder, otherwise=os.fsync),
                 open=failing(number, only=lambda path, flags: os.path.isdir(path), otherwise=os.open))
    monkeypatch.setattr(files, "os", StandIn(os, **{call: calls[call]}))
    with files.atomic_write("file", "w") as file:
        file.write("new")
    assert Path("file").read_text() == "new"


def test_other_errors_of_a_flush_are_errors(workdir, monkeypatch):
    for number, only in ((errno.EIO, is_folder), (errno.EINVAL, lambda descriptor: not is_folder(descriptor))):
        monkeypatch.setattr(files, "os", StandIn(os, fsync=failing(number, only, otherwise=os.fsync)))
        with pytest.raises(OSError, match=os.strerror(number)), files.atomic_write("file") as file:
            file.write(b"new")


# Windows

def windows(monkeypatch, **calls):
    monkeypatch.setattr(files, "os", StandIn(os, name="nt", open=None, **calls))
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "time", StandIn(files.time, sleep=lambda seconds: None))


def test_windows_waits_for_the_readers_of_a_file(workdir, monkeypatch):
    attempts = []

    def replace(*args):
        attempts.append(args)
        if len(attempts) < 3:
            raise PermissionError(errno.EACCES, "in use")
        os.replace(*args)

    windows(monkeypatch, replace=replace)
    with files.atomic_write("file", "w") as file:
        file.write("new")
    assert Path("file").read_text() == "new" and len(attempts) == 3


def test_windows_keeps_a_file_whose_reader_stays(workdir, monkeypatch):
    Path("file").write_text("old")
    windows(monkeypatch, replace=failing(errno.EACCES))
    with pytest.raises(PermissionError), files.atomic_write("file", "w") as file:
        file.write("new")
    assert Path("file").read_text() == "old" and [path.name for path in workdir.iterdir()] == ["file"]


def test_no_file_needs_a_module_of_unix(workdir):
    modules = [path.stem for path in ROOT.glob("*.py")]
    code = "import sys\nfor name in ('fcntl', 'pwd', 'grp', 'termios', 'resource'): sys.modules[name] = None\n" \
           f"for name in {modules}: __import__(name)"
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_signals_that_a_system_lacks_are_not_caught(monkeypatch, as_it_was):  # noqa: F811
    caught = []
    monkeypatch.setattr(device, "signal", StandIn(signal, SIGTERM=None, SIGBREAK=21, signal=lambda *a: caught.append(a[0])))
    device.Processes("cpu").catch_signals()
    assert caught == [signal.SIGINT, 21]


# GPUs

def machine(monkeypatch, cuda=False, mps=False, has_bfloat16=True):
    """A machine with such devices, for device.py."""
    stand_in = StandIn(
        torch, ones=lambda size, device: torch.zeros(size),
        cuda=StandIn(torch.cuda, is_available=lambda: cuda, get_device_name=lambda device: "Tesla T4",
                     is_bf16_supported=lambda including_emulation=True: has_bfloat16 or including_emulation),
        backends=StandIn(torch.backends, mps=StandIn(torch.backends.mps, is_available=lambda: mps)))
    monkeypatch.setattr(device, "torch", stand_in)


@pytest.mark.parametrize("here, name, dtype", [
    (dict(cuda=True, mps=True), "cuda", "bfloat16"), (dict(cuda=True, has_bfloat16=False), "cuda", "float16"),
    (dict(mps=True), "mps", "float32"), (dict(), "cpu", "float32")])
def test_the_default_device_and_dtype(here, name, dtype, monkeypatch):
    machine(monkeypatch, **here)
    picked = device.pick_device()
    assert picked.type == name and device.default_dtype(picked) == dtype


def test_several_processes_use_the_cpu_of_an_apple(monkeypatch):
    machine(monkeypatch, mps=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(device, "dist", StandIn(device.dist, init_process_group=lambda backend: None))
    assert device.Processes("").device == CPU
    with pytest.raises(UserError, match="2 processes train on CUDA or the CPU, not on mps"):
        device.Processes("mps")


def test_float64_is_on_the_cpu_where_the_device_has_none(monkeypatch):
    assert device.float64_device(MPS) == CPU and device.float64_device(CUDA) == CUDA
    assert device.float64(torch.ones(2)).dtype == torch.float64


def test_sums_of_calibration_stay_where_float64_is(small_model, monkeypatch):
    meta = torch.device("meta")  # plays the CPU beside mps, which the CPU plays
    monkeypatch.setattr(least_squares, "float64_device", lambda device: meta)
    monkeypatch.setattr(calibration, "float64", lambda tensor: tensor.detach().to(meta).double())
    moments = least_squares.Moments()
    moments.add(torch.ones(3, 2), torch.ones(3, 4))
    contributions = calibration.contributions(small_model, torch.zeros(2, 8, dtype=torch.long))
    assert {total.device for total in (*moments.sums, *contributions)} == {meta}


@pytest.mark.parametrize("name, half, single", [
    ("NVIDIA A100-SXM4-80GB", 312, 156), ("NVIDIA H100 80GB HBM3", 989, 494), ("NVIDIA H100 PCIe", 756, 378),
    ("NVIDIA H200", 989, 494), ("NVIDIA L4", 121, 60), ("NVIDIA L40S", 362, 183), ("NVIDIA A10", 125, 62.5),
    ("NVIDIA A10G", 70, 35), ("Tesla V100-SXM2-16GB", 125, 15.7), ("Tesla V100-PCIE-16GB", 112, 14), ("Tesla T4", 65, 8.1),
    ("NVIDIA GeForce RTX 3090", 71, 35.6), ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ("NVIDIA RTX 6000 Ada Generation", 364, 182), ("NVIDIA GeForce RTX 3090 Ti", 80, 40)])
def test_the_peak_of_a_known_gpu_is_that_of_its_data_sheet(name, half, single):
    peaks = [device.data_sheet(name, dtype)[1] for dtype in ("bfloat16", "float16", "float32")]
    assert peaks == pytest.approx([half * 1e12, half * 1e12, single * 1e12])


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
                                  "NVIDIA RTX A1000", "NVIDIA GeForce RTX 4080 SUPER", "AMD Instinct MI300X", ""])
def test_the_peak_of_another_gpu_is_not_known(name):
    assert device.data_sheet(name, "float16") is None


def test_mfu_is_a_share_of_a_peak_that_it_never_exceeds(monkeypatch):
    machine(monkeypatch, cuda=True, has_bfloat16=False)
    monkeypatch.setattr(device, "matmul_flops", lambda device, dtype: 1e9)
    speed = device.Speed(CUDA, "float16", world_size=2)
    assert str(speed) == "2 × 65 TFLOP/s (data sheet of T4)" and speed.mfu(65e12) == 0.5
    assert str(device.Speed(CUDA, "bfloat16")) == "1 GFLOP/s (measured)"  # which a T4 emulates
    speed = device.Speed(CPU, "float32")
    assert str(speed) == "1 GFLOP/s (measured)" and speed.mfu(5e8) == 0.5
    assert speed.mfu(4e9) == 1 and speed.mfu(2e9) == 0.5 and str(speed) == "4 GFLOP/s (measured)"


def test_a_peak_measured_on_a_busy_machine_is_the_best_of_its_measurements(monkeypatch):
    """Every second product takes ten times as long, and the first ones all do."""
    durations, now = iter([1.0] * 4 + [0.1, 1.0] * 50), [0.0]

    def clock(calls=[0]):  # noqa: B006
        calls[0] += 1
        now[0] += next(durations) if calls[0] % 2 == 0 else 0
        return now[0]

    monkeypatch.setattr(device, "time", StandIn(device.time, perf_counter=clock, sleep=lambda seconds: None))
    assert device.matmul_flops.__wrapped__(CPU, "float32") == pytest.approx(2 * 256**3 / 0.1)


def test_the_plan_says_what_mfu_is_a_share_of_and_no_step_exceeds_it(workdir, monkeypatch):
    write_dataset("tiny", 5000)
    monkeypatch.setattr(device, "matmul_flops", lambda device, dtype: 1.0)
    said = run_train("--max_iters=3").stdout
    assert "mfu is a share of 1e-09 GFLOP/s (measured)" in said
    shares = [int(line.partition("| mfu ")[2].partition("%")[0]) for line in said.splitlines() if "| mfu " in line]
    assert len(shares) == 3 and all(0 < share <= 100 for share in shares)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
                                   MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 99 bytes")])
def test_memory_that_is_too_small_is_one_line_with_what_to_lower(error, workdir, monkeypatch):
    def forward(*args):
        raise error

    write_dataset("tiny", 5000)
    run_train("--max_iters=2")
    before = Path("out/ckpt.pt").read_bytes()
    monkeypatch.setattr(KronyGPT, "forward", forward)
    said = run_here("train.py", *RUN, "--init_from=resume")
    assert said.returncode == 1 and said.stderr.count("\n") == 1
    assert all(name in said.stderr for name in ("--batch_size", "--gradient_accumulation_steps", "--recompute=True"))
    assert Path("out/ckpt.pt").read_bytes() == before


# log pipes

@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_log_pipe_that_cannot_encode_loses_no_result(encoding, workdir, gpt2_dir, run_script):
    done = run_script("kron_decompose.py", 32, 64, 2, f"--init_from={gpt2_dir}", "--out=made.pt",
                      cwd=workdir, env=dict(PYTHONIOENCODING=encoding))
    assert done.returncode == 0, done.stderr
    assert Path("made.pt").exists() and "error \\u2016W - \\u0174\\u2016/\\u2016W\\u2016" in done.stdout
    done = run_script("kron_decompose.py", 32, 64, 2, "--init_from=nichts_‖.pt", cwd=workdir,
                      env=dict(PYTHONIOENCODING=encoding))
    assert done.returncode == 2 and done.stderr.startswith("error: no checkpoint nichts_\\u2016.pt: ")


# wandb

class FakeWandb(types.ModuleType):
    """wandb as train.py uses it: remembers the runs that were started and what they logged."""

    def __init__(self, error=None):
        super().__init__("wandb")
        self.error, self.runs = error, []

    def init(self, **settings):
        if self.error:
            raise self.error
        run = types.SimpleNamespace(settings=settings, id=settings["id"] or f"new{len(self.runs)}", steps=[], finished=False)
        run.log = lambda entry, step: run.steps.append(step)
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(workdir, monkeypatch):
    write_dataset("tiny", 5000)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_the_recipes_need_no_login():
    recipes = list(ROOT.glob("config/train_gpt2*.py"))
    assert recipes
    for recipe in recipes:
        assert 'wandb_mode = "offline"' in recipe.read_text(), recipe


@pytest.mark.parametrize("environment, mode", [(None, "offline"), ("online", "online"), ("disabled", "disabled")])
def test_the_environment_decides_how_wandb_runs(environment, mode, wandb, monkeypatch):
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    run_train("--wandb_mode=offline", "--max_iters=2")
    assert [run.settings["mode"] for run in wandb.runs] == [mode]
    assert wandb.runs[0].steps == [0, 1, 2, 2] and wandb.runs[0].finished
    run_train("--max_iters=2", "--out_dir=other")  # wandb_mode is off
    assert len(wandb.runs) == 1


@pytest.mark.parametrize("error", [ValueError("no API key"), OSError("no network"), RuntimeError("any\nother")])
def test_a_wandb_that_does_not_start_is_one_line_and_touches_nothing(error, wandb):
    run_train("--max_iters=2")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    wandb.error = error
    for options in (["--overwrite=True"], ["--init_from=resume"], ["--out_dir=new"]):
        said = run_here("train.py", *RUN, "--wandb_mode=online", *options)
        assert said.returncode == 1 and said.stderr.count("\n") == 1, said.stderr
        assert said.stderr.startswith("error: wandb does not start")
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before and not Path("new").exists()


def test_a_wandb_that_is_not_installed_is_one_line(wandb, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = run_here("train.py", *RUN, "--wandb_mode=offline")
    assert said.returncode == 1 and said.stderr.startswith("error: wandb does not start (ModuleNotFoundError")


def test_a_resumed_run_continues_its_wandb_run(wandb):
    run_train("--wandb_mode=offline", "--max_iters=2")
    run_train("--max_iters=4", "--init_from=resume")  # without wandb for once
    run_train("--wandb_mode=offline", "--max_iters=6", "--init_from=resume")
    run_train("--wandb_mode=offline", "--max_iters=2", "--init_from=out/ckpt.pt", "--out_dir=other")
    assert [(run.settings["id"], run.settings["resume"], run.id) for run in wandb.runs] == [
        (None, "allow", "new0"), ("new0", "allow", "new0"), (None, "allow", "new2")]
    assert wandb.runs[1].settings["allow_val_change"] and wandb.runs[1].steps == [5, 6, 6]
    assert load("out/ckpt.pt")["config"]["wandb_run_id"] == "new0"
    assert max(losses_of("out")) == 6
