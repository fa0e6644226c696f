"""Runs that are killed, told to stop, or run out of disk; two that want one directory; readers beside a writer."""
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, StandIn, refused, run_here, snapshot, succeed
from test_train import RUN, RUN_OF_A_CHECKPOINT, load, losses_of, run_train, same, timeless

from kronygpt import checkpoint
from kronygpt.files import lock

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists() or torch.cuda.is_available(),
                                reason="needs Linux, and forks, which a process with CUDA's threads cannot")
ENVIRONMENT = dict(os.environ, PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SHORT_RUN = [*RUN, "--dropout=0.2", "--max_iters=3", "--eval_interval=1", "--eval_iters=1", "--keep=1"]
CHANGES = ("replace", "unlink", "fsync", "mkdir", "rename")  # functions of os that change what is on the disk


def in_child(function, timeout=100):
    """Call a function in a copy of this process, and return the exit status, which is that of what it returns."""
    pid = os.fork()
    if not pid:
        signal.alarm(timeout)
        status = 70
        try:
            status = getattr(function(), "returncode", 0)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(change, script, *options):
    """Run a script in this process, and end this process before the change of the disk with this number."""
    numbers = iter(range(10**6))

    def dying(function, *args, **kwargs):
        if next(numbers) == change:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    for name in CHANGES:
        setattr(os, name, partial(dying, getattr(os, name)))
    return run_here(script, *options)


def start(*options, torchrun=False):
    """A train.py process of its own, in a process group of its own."""
    command = [sys.executable, *(TORCHRUN if torchrun else ()), str(ROOT / "train.py"), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
                            start_new_session=True)


def finish(*options, **kwargs):
    with start(*options, **kwargs) as process:
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return said


def wait_for_step(process):
    """Read what a run says until it has done a step."""
    said = ""
    for line in process.stdout:
        said += line
        if re.match(r"step +\d+/", line):
            return
    raise AssertionError(f"the run ended before it took a step: {said}")


def children(process):
    """The processes that a process has started, in order."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()]


def kill(process):
    """SIGKILL for a run and, where it is torchrun, its processes."""
    for pid in (process.pid, *children(process)):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)


def asides(name="*", folder="out"):
    """The half-written files beside a file of this name."""
    return list(Path(folder).glob(f".{name}.*.tmp"))


def assert_same_runs(one, other):
    for name in ("ckpt.pt", "best.pt"):
        first, second = load(f"{one}/{name}"), load(f"{other}/{name}")
        for key in ("model", "best_val_loss", "iter_num"):
            assert same(first[key], second[key]), (name, key)
    assert same(load(f"{one}/ckpt.pt")["optimizer"]["state"], load(f"{other}/ckpt.pt")["optimizer"]["state"])
    assert timeless(one) == timeless(other)
    assert sorted(os.listdir(one)) == sorted(os.listdir(other))


# kills

@pytest.mark.slow
@pytest.mark.parametrize("case", ["a new run", "a run that starts over"])
def test_a_run_killed_at_any_change_of_the_disk_ends_as_the_one_that_was_not(case, tokens):
    run_train(*SHORT_RUN, "--out_dir=whole")
    if case == "a run that starts over":  # with more older checkpoints than the new run, at other steps and at the same ones
        run_train(*SHORT_RUN, "--out_dir=old", "--seed=5", "--keep=9", "--max_iters=5")
    change, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        shutil.rmtree("out", ignore_errors=True)
        if case == "a run that starts over":
            shutil.copytree("old", "out")
        status = in_child(lambda: killed_at(change, "train.py", *SHORT_RUN, "--overwrite=True"))  # noqa: B023
        is_begun = Path("out/ckpt.pt").exists() and load("out/ckpt.pt")["config"]["seed"] != 5
        if case == "a run that starts over" and not is_begun:
            assert (snapshot("out") | {".lock": b""}).items() >= (snapshot("old") | {".lock": b""}).items()
        run_train(*SHORT_RUN, "--init_from=resume" if is_begun else "--overwrite=True")
        assert_same_runs("whole", "out")
        change += 1 if case == "a run that starts over" else 3
    assert status == 0 and change > 20
    print(f"{case}: killed at any of {change - 1} changes of the disk")


@pytest.mark.slow
def test_two_processes_killed_end_as_those_that_were_not(tokens):
    options = [*SHORT_RUN, "--max_iters=100", "--eval_interval=5", "--keep=2"]
    finish(*options, "--out_dir=whole", torchrun=True)
    with start(*options, "--max_iters=4000", "--lr_decay_iters=100", torchrun=True) as process:
        wait_for_step(process)
        while not asides("ckpt.pt"):
            pass
        kill(process)
    assert load("out/ckpt.pt")["iter_num"] < 100, "the run got too far to be compared"
    finish(*options, "--init_from=resume", torchrun=True)
    assert_same_runs("whole", "out")


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["one process", "torchrun", "Ctrl-C amid an evaluation"])
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(whom, tokens):
    options = [*RUN, "--dropout=0.2", "--max_iters=100000", "--lr_decay_iters=100", "--eval_interval=100000"]
    is_evaluating = whom == "Ctrl-C amid an evaluation"
    with start(*options, *["--eval_iters=1000000"] * is_evaluating, torchrun=True) as process:
        if is_evaluating:
            while len(children(process)) < 2 or not Path("out/.lock").exists():
                time.sleep(0.01)
            time.sleep(1)
            os.killpg(process.pid, signal.SIGINT)
        else:
            wait_for_step(process)
            os.kill(process.pid if whom == "torchrun" else children(process)[1], signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    assert process.returncode  # torchrun's, whose report names that of a process
    done = load("out/ckpt.pt")["iter_num"]
    assert f"after step {done};" in said and not asides() and (done > 0) != is_evaluating
    assert max(losses_of("out"), default=0) == done
    if whom == "one process":
        assert "exitcode: 143" in " ".join(said.split()) or "exitcode  : 143" in said
        finish(*options, "--init_from=resume", f"--max_iters={done + 2}", torchrun=True)
        assert list(losses_of("out")) == list(range(1, done + 3))


def test_a_second_signal_ends_a_run_at_once(tokens, monkeypatch):
    def twice(self, **entry):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("kronygpt.run_dir.RunDir.log", twice)
    assert in_child(lambda: run_here("train.py", *RUN)) == -signal.SIGTERM
    assert load("out/ckpt.pt")["iter_num"] == 0


# disks that are full

def limited(n_bytes, function):
    """What a full disk does, without one: a write beyond so many bytes fails."""
    def limit():
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
        said = function()
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        os.write(1, (said.stderr or "").encode())
        return said

    return in_child(limit)


def test_a_save_that_fails_half_way_spares_the_checkpoint(tokens, capfd):
    run_train("--max_iters=10", "--lr_decay_iters=20")
    before = Path("out/ckpt.pt").read_bytes()
    assert limited(len(before) // 2, lambda: run_here("train.py", *RUN, "--init_from=resume")) == 1
    assert re.fullmatch(r"error: .*File too large.*ckpt\.pt.*\n", capfd.readouterr().out)
    assert Path("out/ckpt.pt").read_bytes() == before and not asides()
    run_train("--init_from=resume")
    assert list(losses_of("out")) == list(range(1, 21))


def test_a_start_over_that_cannot_save_spares_the_old_run(tokens):
    run_train("--max_iters=4", "--eval_interval=2", "--keep=2")
    before = snapshot("out")
    limit = len(before["ckpt.pt"]) // 6  # the first checkpoint has no moments yet
    assert limited(limit, lambda: run_here("train.py", *RUN, "--overwrite=True", "--seed=5")) == 1
    assert snapshot("out") == before


@pytest.mark.parametrize("command, made", [
    ("kron_decompose.py 32 64 1 --init_from=model.pt --out=made.pt", "made.pt"), ("kron_to_gpt.py model.pt made", "made"),
    ("perplexity.py model.pt tiny --json_out=made.json", "made.json")])
def test_a_full_disk_costs_the_new_file_and_not_the_old_one(command, made, tokens, small_model, capfd):
    checkpoint.save("model.pt", small_model)
    succeed(*command.split())
    before = snapshot(".")
    assert limited(100, lambda: run_here(*command.split())) == 1
    assert f"File too large: '{made}" in capfd.readouterr().out and snapshot(".") == before


# what is there already, and what stays

def test_what_a_killed_save_left_is_removed_and_never_read_and_other_files_stay(tokens):
    run_train("--max_iters=4", "--lr_decay_iters=20")
    for name in ("ckpt.pt", "best.pt", "log.jsonl", "loss.png", "ckpt_0000002.pt"):
        Path("out", f".{name}.0123456789ab.tmp").write_bytes(b"half")
    mine = [Path("out", name) for name in ("notes.tmp", "ckpt.pt.tmp", ".ckpt.pt.mine.tmp", ".notes.0123456789ab.tmp")]
    for path in mine:
        path.write_text("mine")
    assert checkpoint.load("out")[1]["iter_num"] == 4
    run_train("--init_from=resume", "--max_iters=5")
    assert sorted(asides()) == sorted(mine[2:]) and all(path.read_text() == "mine" for path in mine)


def test_a_run_is_not_started_over_unless_told(tokens):
    run_train("--max_iters=3", "--eval_interval=1", "--keep=2")
    Path("out/loss.png").write_text("of the old run", encoding="utf-8")
    before = snapshot("out")
    for kept in (["ckpt.pt"], ["best.pt"], ["log.jsonl"], ["loss.png"], ["ckpt_0000002.pt"], list(before)):
        shutil.rmtree("out")
        Path("out").mkdir()
        for name in kept:
            Path("out", name).write_bytes(before[name])
        line = refused("train.py", *RUN, "--seed=5")
        assert "out holds a run already" in line and "--overwrite=True" in line
        assert snapshot("out") == {name: before[name] for name in kept}
    run_train("--seed=5", "--max_iters=2", "--overwrite=True")
    assert load("out/ckpt.pt")["config"]["seed"] == 5 and list(losses_of("out")) == [1, 2]
    assert set(snapshot("out")) == {"ckpt.pt", "best.pt", "log.jsonl", ".lock"}
    run_train("--init_from=out/best.pt", "--max_iters=1", "--overwrite=True")  # from what it then replaces


def test_a_checkpoint_of_another_name_is_never_removed(tokens):
    """The model that a run starts from in its own directory, as people keep it: ckpt-mine.pt, ckpt_final.pt, ckpt_1.pt."""
    run_train("--max_iters=2")
    mine = ("ckpt-mine.pt", "ckpt_final.pt", "ckpt_1.pt", "ckpt_0000001.pt.bak", "best_of_all.pt", "model.pt")
    for name in mine:
        shutil.copy("out/ckpt.pt", f"out/{name}")
    before = Path("out/ckpt.pt").read_bytes()
    for name in ("ckpt.pt", "best.pt", "log.jsonl"):
        Path("out", name).unlink()
    assert "out holds a run already" in refused("train.py", *RUN_OF_A_CHECKPOINT, "--init_from=out/ckpt-mine.pt")
    run_train("--init_from=out/ckpt-mine.pt", "--overwrite=True", "--eval_interval=2", "--max_iters=10", "--keep=1")
    assert all(Path("out", name).read_bytes() == before for name in mine)
    assert [path.name for path in Path("out").glob("ckpt_0*.pt")] == ["ckpt_0000010.pt"]


def steps_kept():
    return {path.name: load(path)["iter_num"] for path in Path("out").glob("ckpt*.pt")}


def test_checkpoints_that_are_kept_and_replaced(tokens):
    Path("out").mkdir()
    Path("out/ckpt_0000006.pt").write_bytes(b"of an older run")
    run_train("--max_iters=10", "--eval_interval=2", "--keep=3", "--overwrite=True")
    assert steps_kept() == {"ckpt_0000006.pt": 6, "ckpt_0000008.pt": 8, "ckpt_0000010.pt": 10, "ckpt.pt": 10}
    shutil.copy("out/ckpt_0000006.pt", "out/ckpt.pt")  # go back: what is newer than step 6 is of the abandoned run
    run_train("--max_iters=7", "--eval_interval=2", "--keep=3", "--init_from=resume")
    assert steps_kept() == {"ckpt_0000006.pt": 6, "ckpt.pt": 7}


def test_checkpoints_by_the_clock(tokens, monkeypatch):
    steps, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, *args, **kwargs: (
        steps.append((Path(path).name, kwargs["iter_num"])), save(path, *args, **kwargs)))
    run_train("--max_iters=4", "--eval_interval=100", "--checkpoint_minutes=1e-9", "--keep=9")
    assert [step for name, step in steps if name == "ckpt.pt"] == [0, 1, 2, 3, 4]
    assert steps_kept() == {"ckpt_0000000.pt": 0, "ckpt.pt": 4}  # those of evaluations


def test_equal_commands_give_equal_bytes(tokens, gpt2_dir):
    written = []
    for _ in range(2):
        succeed("kron_decompose.py", 32, 64, 2, f"--init_from={gpt2_dir}", "--out=made/VL.pt")
        succeed("prune.py", f"--init_from={gpt2_dir}", "--out=made/pruned.pt")
        run_train("--dropout=0.2", "--overwrite=True")
        torch.manual_seed(5)  # nothing rests on the generator that a process happens to have
        written.append([path.read_bytes() for path in sorted(Path().glob("*/*.pt"))])
    assert len(written[0]) == 4 and written[0] == written[1]


# several processes

def test_a_second_run_in_one_directory_is_turned_away(tokens):
    with lock("out"):
        assert "out is in use by another process" in refused("train.py", *RUN)
    run_train("--max_iters=1")


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_whole(small_model, workdir, monkeypatch):
    def save(value):
        torch.nn.init.constant_(small_model.transformer.wpe.weight, value)
        checkpoint.save("model.pt", small_model, iter_num=value)

    def load_replaced(*args, load=torch.load, **options):
        save(2)
        return load(*args, **options)

    save(1)
    monkeypatch.setattr(checkpoint, "torch", StandIn(torch, load=load_replaced))
    model, rest = checkpoint.load("model.pt")
    assert rest["iter_num"] == 1 and (model.transformer.wpe.weight == 1).all()
