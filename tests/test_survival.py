"""Runs that are killed, told to stop, or run out of disk; two that want one directory; readers beside a writer."""
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_here
from test_train import RUN, load, losses_of, run_train, same, timeless, write_dataset

import checkpoint
from configurator import UserError
from files import atomic_write, lock, remove_leftovers

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in Linux's /proc")
LONG_RUN = [*RUN, "--dropout=0.2", "--max_iters=400", "--eval_interval=5", "--eval_iters=1", "--keep=2"]
ENVIRONMENT = dict(os.environ, PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def tokens(workdir):
    return write_dataset("tiny", 5000)


def start(*options, torchrun=False, **kwargs):
    """A train.py process of its own, in a process group of its own."""
    command = [sys.executable, *(TORCHRUN if torchrun else ()), str(ROOT / "train.py"), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
                            start_new_session=True, **kwargs)


def resume_or_start():
    return ["--init_from=resume"] if Path("out/ckpt.pt").exists() else []


def finish(*options, **kwargs):
    with start(*options, **kwargs) as process:
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return said


def wait_for_step(process, step=0):
    """Read what a run says until it has done a step."""
    said = ""
    for line in process.stdout:
        said += line
        found = re.match(r"step +(\d+)/", line)
        if found and int(found[1]) > step:
            return int(found[1])
    raise AssertionError(f"the run ended before it took a step: {said}")


def children(process):
    """The processes that a process has started, in order."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def kill(process):
    """SIGKILL for a run and, where it is torchrun, its processes."""
    for pid in (process.pid, *children(process)):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)


def assert_same_runs(one, other):
    for name in ("ckpt.pt", "best.pt"):
        first, second = load(f"{one}/{name}"), load(f"{other}/{name}")
        for key in ("model", "optimizer", "best_val_loss", "iter_num"):
            assert same(first[key], second[key]), (name, key)
    assert timeless(one) == timeless(other)
    assert sorted(p.name for p in Path(one).iterdir()) == sorted(p.name for p in Path(other).iterdir())


@pytest.mark.slow
def test_a_run_killed_a_dozen_times_ends_as_the_one_that_was_not(tokens):
    finish(*LONG_RUN, "--out_dir=whole")
    moments = random.Random(0)
    killed = saving = 0
    while killed < 12 or saving < 3:
        assert killed < 30, "few kills hit a save"
        with start(*LONG_RUN, "--max_iters=4000", "--lr_decay_iters=400", *resume_or_start()) as process:
            wait_for_step(process)
            if killed % 2:  # in the middle of a save
                while not Path("out/ckpt.pt.tmp").exists():
                    pass
            else:
                time.sleep(moments.uniform(0, 0.3))
            kill(process)
        assert load("out/ckpt.pt")["iter_num"] < 400, "the run got too far to be compared"
        killed += 1
        saving += Path("out/ckpt.pt.tmp").exists()
    finish(*LONG_RUN, *resume_or_start())
    assert_same_runs("whole", "out")
    print(f"{killed} kills survived, {saving} of them in the middle of a save")


@pytest.mark.slow
def test_two_processes_killed_end_as_those_that_were_not(tokens):
    finish(*LONG_RUN, "--out_dir=whole", torchrun=True)
    for delay in (0.05, 0.2, 0.0):
        with start(*LONG_RUN, "--max_iters=4000", "--lr_decay_iters=400", *resume_or_start(), torchrun=True) as process:
            wait_for_step(process)
            time.sleep(delay)
            kill(process)
        assert load("out/ckpt.pt")["iter_num"] < 400, "the run got too far to be compared"
    finish(*LONG_RUN, *resume_or_start(), torchrun=True)
    assert_same_runs("whole", "out")


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["one process", "torchrun", "Ctrl-C"])
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(whom, tokens):
    options = [*RUN, "--dropout=0.2", "--max_iters=100000", "--lr_decay_iters=100", "--eval_interval=100000"]
    with start(*options, torchrun=True) as process:
        wait_for_step(process)
        if whom == "one process":
            os.kill(children(process)[1], signal.SIGTERM)
        elif whom == "torchrun":
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    done = load("out/ckpt.pt")["iter_num"]
    assert f"after step {done}" in said
    assert max(losses_of("out")) == done
    if whom == "one process":  # torchrun itself reports the signal that it was sent
        assert process.returncode == 0, said
    finish(*options, "--init_from=resume", f"--max_iters={done + 2}", torchrun=True)
    assert list(losses_of("out")) == list(range(1, done + 3))


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(tokens):
    with start(*RUN, "--gradient_accumulation_steps=100000", "--eval_interval=1000") as process:  # a step of minutes
        assert "val loss" in next(line for line in process.stdout if line.startswith("step"))
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        still_running = process.poll() is None
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        process.kill()  # which has no effect where the process has gone
        assert still_running and process.wait() == -signal.SIGTERM


def limit_file_size(n_bytes):
    """What a full disk does, without one: a write beyond so many bytes fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def test_a_save_that_fails_half_way_spares_the_checkpoint(tokens):
    finish(*RUN, "--max_iters=10", "--lr_decay_iters=20", "--out_dir=out")
    before = Path("out/ckpt.pt").read_bytes()
    with start(*RUN, "--init_from=resume", preexec_fn=lambda: limit_file_size(len(before) // 2)) as process:
        said = process.communicate(timeout=100)[0]
    assert process.returncode == 1 and "Traceback" not in said
    assert re.fullmatch(r"error: .*(best|ckpt)\.pt.*", said.splitlines()[-1])
    assert Path("out/ckpt.pt").read_bytes() == before
    assert not list(Path("out").glob("*.tmp"))
    run_train("--init_from=resume")
    assert list(losses_of("out")) == list(range(1, 21))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(fraction, workdir):
    Path("file").write_bytes(b"old")
    content = os.urandom(100_000)
    code = "import resource, sys; from files import atomic_write\n" \
           f"resource.setrlimit(resource.RLIMIT_FSIZE, 2 * ({int(fraction * len(content))},))\n" \
           "with atomic_write('file') as file: file.write(sys.stdin.buffer.read())"
    process = subprocess.run([sys.executable, "-c", code], input=content, env=dict(ENVIRONMENT, PYTHONPATH=str(ROOT)),
                             capture_output=True)
    assert process.returncode != 0 and b"File too large" in process.stderr
    assert [p.name for p in workdir.iterdir()] == ["file"] and Path("file").read_bytes() == b"old"


def test_what_a_killed_save_left_is_removed_and_never_read(tokens):
    run_train("--max_iters=4", "--lr_decay_iters=20")
    for name in ("ckpt.pt.tmp", "best.pt.tmp", "log.jsonl.tmp"):
        Path("out", name).write_bytes(b"half")
    assert checkpoint.load("out")[1]["iter_num"] == 4
    run_train("--init_from=resume", "--max_iters=5")
    assert not list(Path("out").glob("*.tmp"))


def test_a_run_is_not_started_over_unless_told(tokens):
    run_train("--max_iters=3")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    said = run_here("train.py", *RUN, "--seed=5")
    assert said.returncode == 2 and said.stderr.count("\n") == 1
    assert "out holds a run already" in said.stderr and "--overwrite=True" in said.stderr
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    run_train("--seed=5", "--max_iters=2", "--overwrite=True")
    assert load("out/ckpt.pt")["config"]["seed"] == 5
    assert list(losses_of("out")) == [1, 2]
    run_train("--init_from=out/best.pt", "--max_iters=1", "--overwrite=True")  # from what it then removes


def test_a_resume_says_which_options_changed(tokens):
    run_train("--max_iters=3")
    said = run_train("--init_from=resume", "--max_iters=4", "--weight_decay=0.3")
    assert "resumed with --max_iters=4, where it was 3\n" in said.stdout
    assert "resumed with --weight_decay=0.3, where it was 0.1\n" in said.stdout
    assert said.stdout.count("resumed with") == 2


def test_older_checkpoints_stay(tokens):
    run_train("--max_iters=10", "--eval_interval=2", "--keep=3")
    assert {path.name: load(path)["iter_num"] for path in Path("out").glob("ckpt*.pt")} == {
        "ckpt_0000004.pt": 4, "ckpt_0000006.pt": 6, "ckpt_0000008.pt": 8, "ckpt.pt": 10}


def test_checkpoints_by_the_clock(tokens):
    run_train("--max_iters=4", "--eval_interval=100", "--keep=9", "--checkpoint_minutes=1e-9")
    assert sorted(load(path)["iter_num"] for path in Path("out").glob("ckpt*.pt")) == [0, 1, 2, 3, 4]


def test_a_second_run_in_one_directory_is_turned_away(tokens):
    with lock("out"):
        said = run_here("train.py", *RUN)
        assert said.returncode == 1 and said.stderr.count("\n") == 1
        assert f"out is in use by process {os.getpid()}" in said.stderr
    run_train("--max_iters=1")


def test_a_second_preparation_of_one_name_is_turned_away(workdir, monkeypatch):
    with lock("data/mine"):
        said = run_here("prepare_pydocs.py", "--out=mine")
        assert said.returncode == 1 and "data/mine is in use by process" in said.stderr
        assert [p.name for p in Path("data/mine").iterdir()] == [".lock"]


def test_a_lock_dies_with_its_process(workdir):
    code = "import sys, time; from files import lock; held = lock('out'); print('held', flush=True); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code], env=dict(ENVIRONMENT, PYTHONPATH=str(ROOT)),
                          stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match=f"process {process.pid}"):
            lock("out")
        process.kill()
        process.wait()
    lock("out").release()


def test_a_killed_write_leaves_what_the_next_start_removes(workdir):
    code = "import os; from files import atomic_write\n" \
           "with atomic_write('out/file') as file: file.write(b'new'); file.flush(); os.kill(os.getpid(), 9)"
    with atomic_write("out/file", "w") as file:
        file.write("old")
    subprocess.run([sys.executable, "-c", code], env=dict(ENVIRONMENT, PYTHONPATH=str(ROOT)))
    assert Path("out/file.tmp").exists() and Path("out/file").read_text() == "old"
    remove_leftovers("out")
    assert [path.name for path in Path("out").iterdir()] == ["file"]


@pytest.mark.slow
def test_readers_beside_a_run_see_whole_checkpoints(tokens):
    with start(*LONG_RUN, "--max_iters=100000", "--eval_interval=1") as process:
        wait_for_step(process)
        seen = []
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            model, rest = checkpoint.load("out")
            assert all(p.isfinite().all() for p in model.parameters())
            moments = rest["optimizer"]["state"].values()
            assert {int(state["step"]) for state in moments} <= {rest["iter_num"]}  # weights and moments of one step
            seen.append(rest["iter_num"])
            said = run_here(*random.choice([("perplexity.py", "out", "tiny"),
                                            ("sample.py", "out", "--num_samples=1", "--max_new_tokens=2")]))
            assert said.returncode == 0, said.stderr
        kill(process)
    assert seen == sorted(seen) and len(set(seen)) > 20
    print(f"{len(seen)} checkpoints read beside the run that wrote them, of {len(set(seen))} steps")


def test_equal_commands_give_equal_bytes(tokens, gpt2_dir):
    def files_of(folder):
        return {path.name: path.read_bytes() for path in Path(folder).glob("*.pt")}

    written = []
    for _ in range(2):
        assert run_here("kron_decompose.py", 32, 64, 2, f"--init_from={gpt2_dir}", "--out=made/VL.pt").returncode == 0
        assert run_here("prune.py", f"--init_from={gpt2_dir}", "--out=made/pruned.pt").returncode == 0
        run_train("--dropout=0.2", "--overwrite=True")
        torch.manual_seed(5)  # nothing rests on the generator that a process happens to have
        written.append((files_of("made"), files_of("out")))
    assert written[0] == written[1]


def test_a_preparation_that_fails_half_way_spares_the_data_set(workdir, tokens):
    before = {path.name: path.read_bytes() for path in Path("data/tiny").iterdir()}
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n" \
           f"sys.argv = ['prepare_pydocs.py', '--out=tiny']; runpy.run_path({str(ROOT / 'prepare_pydocs.py')!r}, " \
           "run_name='__main__')"
    said = subprocess.run([sys.executable, "-c", code], env=dict(ENVIRONMENT, PYTHONPATH=str(ROOT)), capture_output=True,
                          text=True)
    assert said.returncode == 1 and said.stderr.splitlines()[-1] == "error: [Errno 27] File too large: 'data/tiny'"
    assert {path.name: path.read_bytes() for path in Path("data/tiny").iterdir()} == before
