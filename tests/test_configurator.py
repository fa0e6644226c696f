"""Options, errors and signals of scripts, through a small script that is run as a user would."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, refused, run_here, succeed

from kronygpt import configurator
from kronygpt.configurator import UserError, configure

SCRIPT = '''
"""Says what it was given.

    python say.py words
"""
import time
import warnings

import torch

from kronygpt.configurator import UserError, run
from model import KronyGPTConfig

batch_size = 8  # sequences at once
learning_rate = 0.5  # of the optimizer
fast = False  # whether to hurry
name = "\\n"  # of the run
budget: str | None = None  # at most so many parameters
top_k: int | None = None  # sample among these
OUT_OF_MEMORY = "lower --batch_size"


class Panic(BaseException):
    """As pyo3's, of libraries in Rust."""


FAILURES = dict(
    missing=FileNotFoundError("no such thing"), wrong=UserError("two\\nlines"), diverged=UserError("not finite", status=1),
    cuda=torch.OutOfMemoryError("CUDA out of memory\\nmore"), panic=Panic("index out of bounds"), long=TypeError(1000 * "x"),
    cpu=RuntimeError("DefaultCPUAllocator: can't allocate memory: 99 bytes"))


def main(what, where="nowhere"):
    if what in FAILURES:
        raise FAILURES[what]
    if what == "model":
        KronyGPTConfig(n_head=3, n_embd=16)
    if what == "torch":
        torch.nn.Linear(2, 2).load_state_dict({})
    if what == "warn":
        warnings.warn("two\\nlines")
    if what == "wait":
        try:
            print("waiting", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up", flush=True)
    for _ in range(10**5 if what == "lines" else 1):
        print("got", what, where, repr([batch_size, learning_rate, fast, name, budget, top_k]))


if __name__ == "__main__":
    run(main)
'''


@pytest.fixture
def say(workdir):
    """The script, for run_here."""
    (workdir / "say.py").write_text(SCRIPT)
    return workdir / "say.py"


def options(**changes):
    """The globals of a script with options of every kind."""
    return dict(batch_size=8, learning_rate=0.5, fast=False, name="first", budget=None, top_k=None, LIMIT=3, _private=4,
                __annotations__={"budget": str | None, "top_k": int | None}) | changes


def configured(*argv):
    namespace = options()
    return namespace, configure(namespace, argv)


def test_the_last_of_options_and_config_files_wins(workdir):
    Path("small.py").write_text("batch_size = 2\nname = 'small'", encoding="utf-8")
    for argv, batch_size in ((["small.py", "--batch_size=3"], 3), (["--batch_size=3", "small.py"], 2)):
        namespace, positionals = configured("--name=a", "one", *argv, "two", "--fast=True")
        assert positionals == ["one", "two"]
        assert (namespace["batch_size"], namespace["name"], namespace["fast"]) == (batch_size, "small", True)
        assert configurator.given == {"batch_size", "name", "fast"}
    assert configured("small")[1] == ["small"]
    namespace = options()
    assert configure(namespace, ["small"], takes_positionals=False) == [] and namespace["batch_size"] == 2


def test_the_name_of_a_model_runs_no_file_beside_it(workdir):
    """models/foo is a model; models/foo.py is not asked for."""
    Path("models").mkdir()
    for name in "foo.py", "text.py":
        Path("models", name).write_text("from pathlib import Path\nPath('pwned').touch()\n", encoding="utf-8")
    for command in (["perplexity.py", "models/foo", "models/text"], ["prune.py", "--init_from=models/foo"]):
        assert "models/foo" in refused(*command) and not Path("pwned").exists()


def test_a_config_file_sees_the_options_so_far_and_may_compute(workdir):
    Path("double.py").write_text("import math\nsizes = [1, 2]\n_half = batch_size // 2\ntop_k = None\n"
                                 "batch_size = 2 * batch_size + len(sizes)\nlearning_rate = int(math.sqrt(4))\n",
                                 encoding="utf-8")
    namespace, _ = configured("--batch_size=5", "--top_k=5", "double.py")
    assert (namespace["batch_size"], namespace["top_k"]) == (12, None)
    assert namespace["learning_rate"] == 2 and type(namespace["learning_rate"]) is float
    assert not {"sizes", "math", "_half"} & namespace.keys()


@pytest.mark.parametrize("argument, option, value", [
    ("--batch_size=-3", "batch_size", -3), ("--learning_rate=6e-5", "learning_rate", 6e-5),
    ("--learning_rate=2", "learning_rate", 2.0), ("--fast=false", "fast", False), ("--fast", "fast", True),
    ("--name=12", "name", "12"), ("--name=a=b c", "name", "a=b c"), ("--name=", "name", ""), ("--budget=82", "budget", "82"),
    ("--top_k=40", "top_k", 40)])
def test_values_take_the_type_of_the_option(argument, option, value):
    namespace, _ = configured(argument)
    assert namespace == options() | {option: value}
    assert type(namespace[option]) is type(value)


@pytest.mark.parametrize("argument", [
    "--batch_size=2.5", "--batch_size=", "--batch_size=True", "--batch_size=" + 5000 * "9", "--learning_rate=fast",
    "--fast=1", "--top_k=all"])
def test_a_value_of_another_type_is_refused(argument):
    option = argument[2:].partition("=")[0]
    with pytest.raises(UserError, match=f"^--{option} takes ") as caught:
        configured(argument)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("text, status, words", [
    ("batch_size = 2\n\ndef f():\n    return 1 / 0\n\nname = f()\n", 1, "ZeroDivisionError: division by zero (bad.py:4;"),
    ("batch_size = 2\nname = = 3\n", 1, "SyntaxError: invalid syntax (bad.py, line 2)"),
    ("batch_size = 2.5", 2, "--batch_size takes a whole number, not 2.5 (in bad.py)"),
    ("learning_rate = None", 2, "not None (in bad.py)"), ("name = 3", 2, "not 3 (in bad.py)"),
    ("fast = 1", 2, "not 1 (in bad.py)"),
    ("batch_sise = 4", 2, "unknown option --batch_sise (in bad.py): did you mean --batch_size?")])
def test_a_failing_config_file_is_one_line_that_names_the_place(text, status, words, say):
    Path("bad.py").write_text(text, encoding="utf-8")
    assert words in refused(say, "x", "bad.py", status=[status])


@pytest.mark.parametrize("name, nearest", [
    ("batchsize", "batch_size"), ("learning-rate", "learning_rate"), ("lr", "learning_rate"), ("rate", "learning_rate"),
    ("topk", "top_k"), ("output", "out_dir"), ("epochs", None), ("", None)])
def test_an_unknown_option_names_the_nearest(name, nearest):
    with pytest.raises(UserError, match=f"unknown option --{name}: ") as caught:
        configure(options(min_lr=0.1, out_dir="out"), [f"--{name}=3"])
    assert (f"did you mean --{nearest}?" if nearest else "--help lists") in str(caught.value)


def test_only_changed_options_are_printed(say, monkeypatch):
    Path("c.py").write_text("batch_size = 8\nlearning_rate = 0.25", encoding="utf-8")
    assert run_here(say, "x", "c.py", "--name=first", "--top_k=3").stdout.splitlines() == [
        "options: learning_rate=0.25, name='first', top_k=3", "got x nowhere [8, 0.25, False, 'first', None, 3]"]
    assert run_here(say, "x", "here").stdout == "got x here [8, 0.5, False, '\\n', None, None]\n"
    monkeypatch.setenv("RANK", "1")
    assert "options:" not in run_here(say, "x", "--top_k=3").stdout


def test_a_command_that_cannot_be_obeyed_is_one_line(say):
    assert "--batch_size needs a value" in refused(say, "x", "--batch_size")
    assert "lost.py" in refused(say, "x", "lost.py")
    assert "missing a required argument: 'what'; usage: python say.py what [where]" in refused(say)
    assert "too many positional arguments; usage" in refused(say, "a", "b", "c")


def test_help_prints_the_docstring_and_every_option_with_default_and_comment(say):
    result = succeed(say, "x", "--batch_size=3", "--help")
    assert "got" not in result.stdout
    assert "python say.py what [where]" in result.stdout.splitlines()[0]
    assert "Says what it was given.\n\n    python say.py words" in result.stdout
    rows = [line.split(maxsplit=1) for line in result.stdout.partition("options:\n")[2].splitlines()]
    assert rows[:-1] == [["--batch_size=8", "sequences at once"], ["--learning_rate=0.5", "of the optimizer"],
                         ["--fast=False", "whether to hurry"], ["--name='\\n'", "of the run"],
                         ["--budget=", "at most so many parameters"], ["--top_k=", "sample among these"]]
    assert rows[-1][0] == "--traceback"
    usage = run_here("experiments/compare.py", "--help").stdout.partition("\n")[0]
    assert usage == "usage: python -m experiments.compare [config.py ...] [--option=value ...]"


@pytest.mark.parametrize("what, status, line", [
    ("missing", 2, "no such thing"), ("wrong", 2, "two lines"), ("diverged", 1, "not finite"),
    ("cuda", 1, "out of memory: lower --batch_size (CUDA out of memory)"),
    ("cpu", 1, "out of memory: lower --batch_size (DefaultCPUAllocator: can't allocate memory: 99 bytes)")])
def test_exit_status_tells_wrong_arguments_from_failures(what, status, line, say):
    assert refused(say, what, status=[status]) == f"error: {line}\n"


@pytest.mark.parametrize("what, words, file, code", [
    ("model", "", "model.py", "raise"), ("panic", "Panic: index out of bounds ", "say.py", "raise FAILURES[what]"),
    ("torch", "RuntimeError: Error(s) in loading state_dict for Linear: ", "say.py", "load_state_dict({})"),
    ("long", f"TypeError: {300 * 'x'}... ", "say.py", "raise FAILURES[what]")])
def test_any_other_error_is_one_line_that_names_our_file_and_line(what, words, file, code, say, workdir):
    line = refused(say, what, status=[1]).rstrip()
    place, number = line.rpartition(" (")[2].partition(";")[0].rsplit(":", 1)
    assert line.startswith(f"error: {words}") and line.endswith("; --traceback shows all of it)")
    assert place == (file if what == "model" else f"{workdir}/{file}")
    path = ROOT / file if what == "model" else workdir / file
    assert code in path.read_text(encoding="utf-8").splitlines()[int(number) - 1]


def test_traceback_shows_all_of_an_error(say, monkeypatch):
    said = run_here(say, "wrong", "--traceback")
    assert said.returncode == 2 and said.stderr.startswith("Traceback") and "in main" in said.stderr
    monkeypatch.setenv("KRONYGPT_TRACEBACK", "1")
    assert run_here(say, "wrong").stderr == said.stderr


def start(*args, encoding="utf-8", **options):
    """The script in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    return subprocess.Popen([sys.executable, "say.py", *args], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


def test_a_warning_is_one_line_and_a_log_that_cannot_encode_loses_none(say):
    with start("warn", "‖", encoding="ascii") as script:
        out, err = script.communicate(timeout=60)
    assert err == "warning: two lines\n" and out.startswith("got warn \\u2016 ")


def test_a_reader_that_goes_away_is_no_traceback(say):
    with start("lines") as script:
        assert script.stdout.readline().startswith("got lines")
        script.stdout.close()
        assert script.stderr.read() == ""
        assert script.wait(timeout=60) == 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_ends_a_script_after_it_has_cleaned_up_and_what_nohup_ignores_stays_ignored(name, say):
    number = getattr(signal, name)
    with start("wait", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as script:
        assert script.stdout.readline() == "waiting\n"
        script.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            script.wait(timeout=0.3)
        script.send_signal(number)
        out, err = script.communicate(timeout=60)
    assert (out, err, script.returncode) == ("cleaned up\n", "", 128 + number)
