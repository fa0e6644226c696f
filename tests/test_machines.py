"""Machines unlike the one that runs the tests: file systems, Windows, memory, locales, and wandb without a login."""
import ast
import errno
import fcntl
import os
import re
import stat
import sys
import types
import warnings
from pathlib import Path

import filelock._native._unix as flock_module
import pytest
from conftest import ROOT, StandIn, refused, succeed
from test_survival import steps_kept
from test_train import RUN, load, losses_of, run_train

from kronygpt import files


def failing(number):
    """A function of the operating system that answers with an error."""
    def call(*args, **options):
        raise OSError(number, os.strerror(number))

    return call


# a file system without locks and a way to flush a folder, as a network's may be

def test_a_run_on_a_poor_file_system_gets_one_warning(tokens, monkeypatch):
    is_folder = {True: failing(errno.EINVAL), False: os.fsync}
    monkeypatch.setattr(flock_module, "fcntl", StandIn(fcntl, flock=failing(errno.ENOLCK)))
    monkeypatch.setattr(files, "os", StandIn(os, fsync=lambda descriptor: is_folder[
        stat.S_ISDIR(os.fstat(descriptor).st_mode)](descriptor)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_train("--max_iters=8", "--eval_interval=2", "--keep=2")
    assert [str(w.message).partition(" (")[0] for w in caught] == ["no locks in out"]
    assert steps_kept() == {"ckpt_0000006.pt": 6, "ckpt_0000008.pt": 8, "ckpt.pt": 8}


def test_a_file_that_cannot_be_flushed_is_an_error(workdir, monkeypatch):
    Path("file").write_text("old", encoding="utf-8")
    monkeypatch.setattr(files, "os", StandIn(os, fsync=failing(errno.EIO)))
    with pytest.raises(OSError, match="file"), files.atomic_write("file") as file:
        file.write(b"new")
    assert Path("file").read_text(encoding="utf-8") == "old"


# Windows

def test_no_file_needs_a_module_of_unix():
    unix = {"fcntl", "pwd", "grp", "termios", "resource"}
    for path in (path for folder in ("", "kronygpt", "experiments") for path in (ROOT / folder).glob("*.py")):
        imports = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Import)]
        assert not unix & {alias.name for node in imports for alias in node.names}, path


# a locale without Unicode

def test_the_locale_decides_nothing(workdir, gpt2_dir, run_script):
    """The encoding of files is UTF-8, whatever a machine's is."""
    Path("text.txt").write_bytes(30 * "déjà vu ‖ ".encode())
    Path("é.py").write_bytes("# déjà\njson_out = 'there.json'\n".encode())
    done = run_script("perplexity.py", gpt2_dir, "text.txt", "é.py", cwd=workdir,
                      env=dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"))
    assert done.returncode == 0, done.stderr
    succeed("perplexity.py", gpt2_dir, "text.txt", "--json_out=here.json")
    there, here = (re.sub('"tokens_per_second": .*', "", Path(name).read_text(encoding="utf-8"))
                   for name in ("there.json", "here.json"))
    assert there == here and "perplexity" in here


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
def wandb(tokens, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.mark.parametrize("environment, mode", [(None, "offline"), ("online", "online"), ("disabled", "disabled")])
def test_the_environment_decides_how_wandb_runs(environment, mode, wandb, monkeypatch):
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    run_train("--wandb_mode=offline", "--max_iters=2")
    assert [run.settings["mode"] for run in wandb.runs] == [mode]
    assert wandb.runs[0].steps == [0, 1, 2, 2] and wandb.runs[0].finished
    run_train("--max_iters=2", "--out_dir=other")  # wandb_mode is off
    assert len(wandb.runs) == 1


def test_a_wandb_that_does_not_start_is_one_line_and_touches_nothing(wandb):
    run_train("--max_iters=2")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    wandb.error = RuntimeError("no\nnetwork")
    for options in (["--overwrite=True"], ["--init_from=resume"], ["--out_dir=new"]):
        assert refused("train.py", *RUN, "--wandb_mode=online", *options).startswith("error: RuntimeError: no (")
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before and not Path("new").exists()


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
