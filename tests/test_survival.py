"""Runs that are killed, told to stop, or run out of disk; two that want one directory; readers beside a writer."""
import errno
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, StandIn, run_here
from test_train import RUN, RUN_OF_A_CHECKPOINT, load, losses_of, run_train, same, timeless, write_dataset

from kronygpt import checkpoint, files
from kronygpt.configurator import UserError
from kronygpt.files import atomic_write, lock

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in Linux's /proc")
LONG_RUN = [*RUN, "--dropout=0.2", "--max_iters=400", "--eval_interval=5", "--eval_iters=1", "--keep=2"]
ENVIRONMENT = dict(os.environ, PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1")
WITHOUT_LINKS = ["-c", f"import os, runpy, sys; del os.link, sys.argv[0]; sys.path.insert(0, {str(ROOT)!r}); "
                       "runpy.run_path(sys.argv[0], run_name='__main__')"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def tokens(workdir):
    return write_dataset("tiny", 5000)


def start(*options, torchrun=False, has_links=True, **kwargs):
    """A train.py process of its own, in a process group of its own; without hard links, as on FAT."""
    launch = TORCHRUN if torchrun else () if has_links else WITHOUT_LINKS
    command = [sys.executable, *launch, str(ROOT / "train.py"), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
                            start_new_session=True, **kwargs)


def asides(name="*", folder="out"):
    """The half-written files beside a file of this name."""
    return list(Path(folder).glob(f".{name}.*.tmp"))


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
        options = [*LONG_RUN, "--max_iters=4000", "--lr_decay_iters=400", *resume_or_start()]
        with start(*options, has_links=killed % 4 < 2) as process:
            wait_for_step(process)
            if killed % 2:  # in the middle of a save
                while not asides("ckpt.pt"):
                    pass
            else:
                time.sleep(moments.uniform(0, 0.3))
            kill(process)
        assert load("out/ckpt.pt")["iter_num"] < 400, "the run got too far to be compared"
        killed += 1
        saving += bool(asides("ckpt.pt"))
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
    assert not asides()
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


def test_what_a_killed_save_left_is_removed_and_never_read_and_other_files_stay(tokens):
    run_train("--max_iters=4", "--lr_decay_iters=20")
    for name in ("ckpt.pt", "best.pt", "log.jsonl", "loss.png", "ckpt_0000002.pt"):  # the last one where links are copies
        Path("out", f".{name}.0123456789ab.tmp").write_bytes(b"half")
    mine = [Path("out", name) for name in ("notes.tmp", "ckpt.pt.tmp", ".ckpt.pt.mine.tmp", ".notes.0123456789ab.tmp")]
    for path in mine:
        path.write_text("mine")
    assert checkpoint.load("out")[1]["iter_num"] == 4
    run_train("--init_from=resume", "--max_iters=5")
    assert sorted(asides()) == sorted(mine[2:]) and all(path.read_text() == "mine" for path in mine)


def test_files_of_others_in_a_data_set_stay(tokens):
    Path("data/tiny/notes.tmp").write_text("mine")
    Path("data/tiny/.train.bin.0123456789ab.tmp").write_text("half")
    assert run_here("experiments/prepare_pydocs.py", "--out=tiny").returncode == 0
    assert sorted(path.name for path in Path("data/tiny").iterdir()) == ["meta.json", "notes.tmp", "train.bin", "val.bin"]


def contents(folder="out"):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_run_is_not_started_over_unless_told(tokens):
    run_train("--max_iters=3", "--eval_interval=1", "--keep=2")
    Path("out/loss.png").write_text("of the old run")
    before = contents()
    for kept in (["ckpt.pt"], ["best.pt"], ["log.jsonl"], ["loss.png"], ["ckpt_0000001.pt"], list(before)):
        shutil.rmtree("out")
        Path("out").mkdir()
        for name in kept:
            Path("out", name).write_bytes(before[name])
        said = run_here("train.py", *RUN, "--seed=5")
        assert said.returncode == 2 and said.stderr.count("\n") == 1
        assert "out holds a run already" in said.stderr and "--overwrite=True" in said.stderr
        assert contents() == {name: before[name] for name in kept}
    run_train("--seed=5", "--max_iters=2", "--overwrite=True")
    assert load("out/ckpt.pt")["config"]["seed"] == 5
    assert list(losses_of("out")) == [1, 2]
    assert set(contents()) == {"ckpt.pt", "best.pt", "log.jsonl", ".lock"}
    run_train("--init_from=out/best.pt", "--max_iters=1", "--overwrite=True")  # from what it then replaces


def test_a_checkpoint_of_another_name_is_never_removed(tokens):
    """The start of a run in its own directory, as people keep it: ckpt-mine.pt, ckpt_final.pt, ckpt_1.pt."""
    run_train("--max_iters=2")
    mine = ("ckpt-mine.pt", "ckpt_final.pt", "ckpt_1.pt", "ckpt_0000001.pt.bak", "best_of_all.pt", "model.pt")
    for name in mine:
        shutil.copy("out/ckpt.pt", f"out/{name}")
    before = Path("out/ckpt.pt").read_bytes()
    for name in ("ckpt.pt", "best.pt", "log.jsonl"):
        Path("out", name).unlink()
    said = run_here("train.py", *RUN_OF_A_CHECKPOINT, "--init_from=out/ckpt-mine.pt")
    assert said.returncode == 2 and "out holds a run already" in said.stderr
    run_train("--init_from=out/ckpt-mine.pt", "--overwrite=True", "--eval_interval=2", "--max_iters=10", "--keep=1")
    assert all(Path("out", name).read_bytes() == before for name in mine)
    assert [path.name for path in Path("out").glob("ckpt_0*.pt")] == ["ckpt_0000008.pt"]


def test_a_start_over_that_cannot_save_spares_the_old_run(tokens):
    finish(*RUN, "--max_iters=4", "--eval_interval=2", "--keep=2")
    before = contents()
    limit = len(before["ckpt.pt"]) // 6  # the first checkpoint has no moments yet
    with start(*RUN, "--overwrite=True", "--seed=5", preexec_fn=lambda: limit_file_size(limit)) as process:
        said = process.communicate(timeout=100)[0]
    assert process.returncode == 1 and "ckpt.pt" in said.splitlines()[-1]
    after = contents()
    assert after.pop(".lock") and before.pop(".lock") and after == before


def test_a_full_disk_is_called_full(tokens, gpt2_dir, monkeypatch):
    """Where torch, safetensors and json write; the others report the system's error as it is."""
    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if self.file.tell() > 20_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    @contextmanager
    def atomic_write_to_a_full_disk(path, *args, **kwargs):
        with files.atomic_write(path, *args, **kwargs) as file:
            yield Full(file)

    monkeypatch.setattr(checkpoint, "atomic_write", atomic_write_to_a_full_disk)
    said = run_here("kron_decompose.py", 32, 64, 1, f"--init_from={gpt2_dir}", "--out=made.pt")
    assert (said.returncode, said.stderr) == (1, "error: the disk is full: made.pt\n")
    said = run_here("train.py", *RUN)
    assert said.returncode == 1 and said.stderr == "error: the disk is full: out/ckpt.pt\n"
    assert not Path("made.pt").exists() and not asides()

    import safetensors.torch
    import transformers.modeling_utils

    def save_file(tensors, path, **kwargs):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", save_file)
    said = run_here("kron_to_gpt.py", gpt2_dir, "made")
    assert said.returncode == 1 and said.stderr == "error: the disk is full: made\n"
    assert not Path("made").exists() and not asides("made", ".")


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
        said = run_here("experiments/prepare_pydocs.py", "--out=mine")
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


@pytest.mark.parametrize("make", [
    "with atomic_write('out/made', 'w') as file: file.write('new'); file.flush(); os.kill(os.getpid(), 9)",
    "with atomic_directory('out/made', str) as path: (path / 'a').write_text('new'); os.kill(os.getpid(), 9)"])
def test_what_a_killed_writer_left_goes_with_the_next_write_and_that_of_a_live_one_stays(make, workdir):
    def start_writer(code):
        imports = "import os, time\nfrom files import atomic_directory, atomic_write"
        return subprocess.Popen([sys.executable, "-c", f"{imports}\n{code}"],
                                env=dict(ENVIRONMENT, PYTHONPATH=str(ROOT)))

    live = start_writer(make.replace("os.kill(os.getpid(), 9)", "time.sleep(100)"))
    while not (there := asides("made")) or (there[0].is_dir() and not (there[0] / "a").exists()):
        time.sleep(0.01)
    start_writer(make).wait()
    assert len(asides("made")) == 2 and not Path("out/made").exists()
    with atomic_write("out/made", "w") as file:
        file.write("newer")
    assert asides("made") == there and Path("out/made").read_text() == "newer"
    live.kill()
    live.wait()
    with atomic_write("out/made", "w") as file:
        file.write("newest")
    assert [path.name for path in Path("out").iterdir()] == ["made"] and Path("out/made").read_text() == "newest"


def test_two_writers_of_one_file_do_not_mix(workdir):
    code = "import sys\nfrom files import atomic_write\nfor _ in range(100):\n" \
           "    with atomic_write('file', 'w') as file: [file.write(sys.argv[1] * 1000) for _ in range(100)]"
    writers = [subprocess.Popen([sys.executable, "-c", code, letter], env=dict(ENVIRONMENT, PYTHONPATH=str(ROOT)))
               for letter in "abc"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if Path("file").exists():
            text = Path("file").read_text()
            assert len(text) == 100_000 and len(set(text)) == 1
            seen.add(text[0])
    assert all(writer.returncode == 0 for writer in writers) and len(seen) > 1
    assert [path.name for path in workdir.iterdir()] == ["file"]


def test_a_link_where_a_half_written_file_will_be_is_not_followed(workdir, monkeypatch):
    Path("victim").write_text("mine")
    links = iter([Path(f".file.{digit * 12}.tmp") for digit in "01"])

    def token_hex(n_bytes):
        link = next(links)
        if link.name.startswith(".file.0"):
            link.symlink_to("victim")
        return link.name.split(".")[2]

    monkeypatch.setattr(files, "secrets", StandIn(files.secrets, token_hex=token_hex))
    with atomic_write("file", "w") as file:
        file.write("new")
    assert Path("victim").read_text() == "mine" and Path("file").read_text() == "new" and not Path("file").is_symlink()


def test_a_link_is_written_through(workdir):
    Path("elsewhere").mkdir()
    Path("elsewhere/target").write_text("old")
    Path("link").symlink_to("elsewhere/target")
    Path("dangling").symlink_to("elsewhere/none")
    for name in ("link", "dangling"):
        with atomic_write(name, "w") as file:
            file.write("new")
        assert Path(name).is_symlink() and Path(name).read_text() == "new"
    assert sorted(os.listdir("elsewhere")) == ["none", "target"]


@pytest.mark.parametrize("target", ["pipe", "folder", "link_to_pipe", "socket", "file/in/it"])
def test_what_is_no_file_is_not_replaced(target, workdir):
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("file").touch()
    Path("link_to_pipe").symlink_to("pipe")
    socket.socket(socket.AF_UNIX).bind("socket")
    before = os.stat(target) if target != "file/in/it" else None
    with pytest.raises(UserError, match=r"is a directory|is no regular file|is a file"), atomic_write(target) as file:
        file.write(b"new")
    assert before is None or os.stat(target)[:2] == before[:2]
    assert not list(workdir.glob(".*"))


@pytest.mark.parametrize("command", [
    "kron_decompose.py 32 64 1 --init_from={} --out=pipe", "prune.py --init_from={} --out=pipe",
    "perplexity.py {} text.txt --json_out=pipe", "kron_to_gpt.py {} pipe", "train.py --out_dir=pipe"])
def test_scripts_refuse_a_pipe_before_they_work(command, gpt2_dir, workdir):
    os.mkfifo("pipe")
    Path("text.txt").write_text("some text " * 20)
    said = run_here(*command.format(gpt2_dir).split())
    assert said.returncode == 2 and said.stderr.count("\n") == 1 and "pipe" in said.stderr
    assert stat.S_ISFIFO(os.stat("pipe").st_mode) and sorted(os.listdir()) == ["pipe", "text.txt"]


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


@contextmanager
def small_disk(n_bytes):
    """A file system of a size, under the current directory."""
    Path("disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", "disk"], capture_output=True)
    try:
        if mounted.returncode:
            pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.decode()}")
        yield Path("disk")
    finally:
        subprocess.run(["umount", "-l", "disk"], capture_output=True)
        Path("disk").rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    "kron_decompose.py 32 64 1 --init_from=model.pt --out=disk/made.pt", "prune.py --init_from=model.pt --out=disk/made.pt",
    "kron_to_gpt.py model.pt disk/made", "perplexity.py model.pt text.txt --json_out=disk/made.json",
    "prepare_pydocs.py --out=full", "train.py --init_from=model.pt --out_dir=disk/out --overwrite=True --keep=2 "
    "--eval_interval=2 --max_iters=6 --block_size=16 --batch_size=4 --gradient_accumulation_steps=1 --eval_iters=1 "
    "--dataset=tiny"])
def test_a_disk_that_is_full(command, tokens, small_model):
    """On disks of growing sizes, with an old file on them: it is there until the new one is, and what is said is true."""
    checkpoint.save("model.pt", small_model)
    Path("text.txt").write_text("some text " * 20)
    script, *options = command.split()
    is_told = is_done = False
    for size in (64, 256, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384, 32768):
        with small_disk(1024 * size) as disk:
            Path("data/full").unlink(missing_ok=True)
            Path("data/full").symlink_to(disk.absolute())
            with open(disk / "filler", "wb") as filler:
                filler.write(bytes(1024 * (size // 2)))
            said = subprocess.run([sys.executable, str(ROOT / script), *options], env=ENVIRONMENT, capture_output=True,
                                  text=True)
            left = sorted(str(path.relative_to(disk)) for path in disk.rglob("*") if path.suffix == ".tmp")
            assert "Traceback" not in said.stderr and not left, said.stderr
            if said.returncode:
                assert said.stderr.splitlines()[-1].startswith("error: the disk is full"), said.stderr
            is_told, is_done = is_told or said.returncode == 1, said.returncode == 0
            for path in disk.glob("**/*.pt"):
                checkpoint.load(str(path))
        if is_done:
            break
    assert is_told or "json" in command  # which is smaller than the smallest disk
    assert is_done


@pytest.mark.slow
def test_two_exports_to_one_directory_some_of_them_killed(small_model, workdir):
    models = []
    for i in range(2):
        with torch.no_grad():
            small_model.transformer.wte.weight.mul_(0.5)
        checkpoint.save(f"{i}.pt", small_model)
        assert run_here("kron_to_gpt.py", f"{i}.pt", f"whole_{i}").returncode == 0
        models.append({path.name: path.read_bytes() for path in Path(f"whole_{i}").iterdir()})
    moments = random.Random(0)
    for _ in range(6):
        exports = [subprocess.Popen([sys.executable, str(ROOT / "kron_to_gpt.py"), f"{i}.pt", "made"], env=ENVIRONMENT,
                                    stdout=subprocess.DEVNULL) for i in range(2)]
        while not asides("made", "."):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        exports[0].kill()
        assert [process.wait() for process in exports] in ([0, 0], [-signal.SIGKILL, 0])
        assert {path.name: path.read_bytes() for path in Path("made").iterdir()} in models
    assert run_here("kron_to_gpt.py", "0.pt", "made").returncode == 0
    assert not asides("made", ".")
