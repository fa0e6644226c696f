"""Options, errors and signals of scripts, through a small script that is run as a user would."""
import os
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from conftest import ROOT, run_here

from kronygpt import configurator
from kronygpt.configurator import UserError, check_choice, configure

SCRIPT = '''
"""Says what it was given.

    python say.py words
"""
import time
import warnings

from kronygpt.configurator import UserError, run

batch_size = 8  # sequences at once
learning_rate = 0.5  # of the optimizer
fast = False  # whether to hurry
name = "\\n"  # of the run
budget: str | None = None  # at most so many parameters
top_k: int | None = None  # sample among these
OUT_OF_MEMORY = "lower --batch_size"


class Panic(BaseException):
    """As pyo3's, of libraries in Rust."""


def deep(what):
    import torch

    from model import KronyGPTConfig

    return {"model": lambda: KronyGPTConfig(n_head=3, n_embd=16), "panic": lambda: panic("index out of bounds"),
            "torch": lambda: torch.nn.Linear(2, 2).load_state_dict({}), "key": lambda: {}["a key"],
            "silent": lambda: raised(AssertionError()), "long": lambda: raised(TypeError(1000 * "x")),
            "memory": lambda: raised(MemoryError()),
            "cuda": lambda: raised(torch.OutOfMemoryError("CUDA out of memory\\nmore")),
            }[what]()


def panic(message):
    raise Panic(message)


def raised(error):
    raise error


def main(what, where="nowhere"):
    failures = {"missing": FileNotFoundError("no such thing"), "disk": OSError(28, "No space", "out"), "odd": OSError("odd"),
                "wrong": UserError("two\\nlines"), "diverged": UserError("not finite", status=1)}
    if what in failures:
        raise failures[what]
    if what == "warn":
        warnings.warn("two\\nlines")
    elif what == "wait":
        try:
            print("waiting", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up", flush=True)
    elif what == "lines":
        for _ in range(10**5):
            print("got lines")
    elif what != "x":
        deep(what)
    print("got", what, where, repr([batch_size, learning_rate, fast, name, budget, top_k]))


if __name__ == "__main__":
    run(main)
'''


@pytest.fixture
def say(workdir):
    """Runs the script in this process."""
    (workdir / "say.py").write_text(SCRIPT)
    return lambda *args: run_here(workdir / "say.py", *args)


@pytest.fixture
def config(workdir):
    """Writes a config file, and returns its path as a string."""
    def write(name, text):
        (workdir / name).write_text(dedent(text), encoding="utf-8")
        return f"./{name}"

    return write


def options(**changes):
    """The globals of a script with options of every kind."""
    return dict(batch_size=8, learning_rate=0.5, fast=False, name="first", budget=None, top_k=None, LIMIT=3, _private=4,
                __annotations__={"budget": str | None, "top_k": int | None}) | changes


def configured(*argv):
    namespace = options()
    return namespace, configure(namespace, argv)


def refused(say, *args, status=2):
    """The one line on stderr of a command that is not obeyed."""
    result = say(*args)
    assert result.returncode == status, result
    line, = result.stderr.splitlines()
    assert "got" not in result.stdout and line.startswith("error: ")
    return line


def test_the_last_of_options_and_config_files_wins(config):
    small, large = config("small.py", "batch_size = 2\nname = 'small'"), config("large.py", "batch_size = 64")
    for argv, batch_size, name in ([small, large], 64, "small"), ([large, small], 2, "small"), \
            ([small, "--batch_size=3"], 3, "small"), (["--batch_size=3", small], 2, "small"), \
            (["--name=mine", large], 64, "mine"):
        namespace, positionals = configured(*argv)
        assert (namespace["batch_size"], namespace["name"], positionals) == (batch_size, name, [])
    namespace, positionals = configured("--name=a", "one", small, "two", "--fast=True")
    assert positionals == ["one", "two"]
    assert (namespace["batch_size"], namespace["name"], namespace["fast"]) == (2, "small", True)
    assert configurator.given == {"batch_size", "name", "fast"}


def test_py_may_be_left_out_only_without_positionals(config):
    small = config("small.py", "batch_size = 2").removesuffix(".py")
    for name in small, "small":
        assert configured(name)[1] == [name]
        namespace = options()
        assert configure(namespace, [name], takes_positionals=False) == []
        assert namespace["batch_size"] == 2


def test_the_name_of_a_model_runs_no_file_beside_it(workdir):
    """models/foo is a model; models/foo.py is not asked for."""
    Path("models").mkdir()
    for name in ("foo.py", "text.py", "768.py"):
        Path("models", name).write_text("from pathlib import Path\nPath('pwned').touch()\n", encoding="utf-8")
    for command in (["perplexity.py", "models/foo", "models/text"], ["sample.py", "models/foo"],
                    ["kron_to_gpt.py", "models/text", "models/foo"], ["prune.py", "--init_from=models/foo"],
                    ["kron_decompose.py", "models/768", "models/768", "models/768", "--init_from=models/foo"]):
        said = run_here(*command)
        assert said.returncode in (1, 2) and said.stderr.count("\n") == 1
        assert not Path("pwned").exists(), command
    assert "models/foo" in run_here("perplexity.py", "models/foo", "models/text").stderr


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbfbatch_size = 2\nname = 'd\xc3\xa9j\xc3\xa0'\n",
    b"# -*- coding: latin-1 -*-\nbatch_size = 2\nname = 'd\xe9j\xe0'\n",
    b"batch_size = 2\r\nname = 'd\xc3\xa9j\xc3\xa0'\r\n",
])
def test_a_config_file_is_read_as_python_reads_it(content, workdir):
    Path("small.py").write_bytes(content)
    namespace, _ = configured("small.py")
    assert (namespace["batch_size"], namespace["name"]) == (2, "déjà")


def test_a_config_file_sees_the_options_so_far_and_may_compute(config):
    config("double.py", """
        import math
        sizes = [1, 2]
        _half = batch_size // 2
        batch_size = 2 * batch_size + len(sizes)
        learning_rate = int(math.sqrt(4))
        top_k = None
    """)
    namespace, _ = configured("--batch_size=5", "--top_k=5", "./double.py")
    assert (namespace["batch_size"], namespace["top_k"]) == (12, None)
    assert namespace["learning_rate"] == 2 and type(namespace["learning_rate"]) is float
    assert not {"sizes", "math", "_half"} & namespace.keys()


@pytest.mark.parametrize("argument, option, value", [
    ("--batch_size=-3", "batch_size", -3), ("--learning_rate=6e-5", "learning_rate", 6e-5),
    ("--learning_rate=2", "learning_rate", 2.0), ("--fast=True", "fast", True), ("--fast=false", "fast", False),
    ("--fast", "fast", True), ("--name=12", "name", "12"), ("--name=a=b c", "name", "a=b c"), ("--name=", "name", ""),
    ("--budget=82", "budget", "82"), ("--top_k=40", "top_k", 40), 
    ("--batch_size=99999999999999999999", "batch_size", 10**20 - 1),
])
def test_values_take_the_type_of_the_option(argument, option, value):
    namespace, _ = configured(argument)
    assert namespace == options() | {option: value}
    assert type(namespace[option]) is type(value)


@pytest.mark.parametrize("argument", [
    "--batch_size=2.5", "--batch_size=many", "--batch_size=", "--batch_size=True", "--batch_size=[1]",
    "--batch_size=" + 5000 * "9", "--learning_rate=fast", "--learning_rate=True", "--learning_rate=nan",
    "--learning_rate=-1e999", "--fast=1", "--fast=yes", "--fast=", "--top_k=2.5", "--top_k=all",
])
def test_a_value_of_another_type_is_refused(argument):
    option = argument[2:].partition("=")[0]
    with pytest.raises(UserError, match=f"^--{option} takes ") as caught:
        configured(argument)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("text", ["batch_size = 2.5", "batch_size = '2'", "name = 3", "fast = 1", "learning_rate = None",
                                  "learning_rate = float('inf')", "batch_size = [1] * 10**6"])
def test_a_config_value_of_another_type_is_refused(config, text):
    with pytest.raises(UserError, match=f"^--{text.split()[0]} takes .*wrong.py") as caught:
        configured(config("wrong.py", text))
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("text, words", [
    ("batch_size = 2\n\ndef f():\n    return 1 / 0\n\nname = f()\n", "line 4: ZeroDivisionError: division by zero"),
    ("batch_size = 2\nname = = 3\n", "line 2: "), ("raise ValueError('one\\ntwo')", "line 1: ValueError: one"),
    ("raise SystemExit('bye')", "line 1: SystemExit: bye"), ("def f(): f()\nf()", "line 1: RecursionError"),
    ("\0", "ull byte"), ("batch_sise = 4", "did you mean --batch_size?")])
def test_a_failing_config_file_is_one_line_that_names_the_place(text, words, say, config):
    line = refused(say, "x", config("bad.py", text))
    assert "bad.py" in line and words in line and len(line) < 300


def test_a_config_file_that_is_a_pipe_does_not_hang(workdir):
    os.mkfifo("small.py")
    with pytest.raises(UserError, match=r"no config file small\.py"):
        configured("small.py")


def test_a_word_that_is_no_choice_is_refused():
    check_choice(dict(mode="offline"), "mode", "off", "online", "offline")
    for value in "on", "", "Off":
        with pytest.raises(UserError, match=f"^--mode is off, online or offline, not {value}$"):
            check_choice(dict(mode=value), "mode", "off", "online", "offline")


@pytest.mark.parametrize("name, nearest", [
    ("batchsize", "batch_size"), ("learning-rate", "learning_rate"), ("lr", "learning_rate"), ("rate", "learning_rate"),
    ("size", "batch_size"), ("LR", "learning_rate"), ("topk", "top_k"), ("fats", "fast"), ("output", "out_dir"),
    ("epochs", None), ("", None)])
def test_an_unknown_option_names_the_nearest(name, nearest):
    with pytest.raises(UserError, match=f"unknown option --{name}: ") as caught:
        configure(options(min_lr=0.1, out_dir="out"), [f"--{name}=3"])
    assert (f"did you mean --{nearest}?" if nearest else "--help lists") in str(caught.value)


def test_only_changed_options_are_printed(say, config, monkeypatch):
    config("c.py", "batch_size = 8\nlearning_rate = 0.25")
    assert say("x", "./c.py", "--name=first", "--top_k=3").stdout.splitlines() == [
        "options: learning_rate=0.25, name=first, top_k=3", "got x nowhere [8, 0.25, False, 'first', None, 3]"]
    assert say("x", "here").stdout == "got x here [8, 0.5, False, '\\n', None, None]\n"
    assert say("x", "--name=a\nb\n").stdout.splitlines()[0] == "options: name=(2 lines)"
    monkeypatch.setenv("RANK", "1")
    assert "options:" not in say("x", "--top_k=3").stdout


def test_a_command_that_cannot_be_obeyed_is_one_line(say):
    assert "--batch_size needs a value" in refused(say, "x", "--batch_size")
    assert "no config file lost.py" in refused(say, "x", "lost.py")
    assert "missing argument; usage: python say.py what [where]" in refused(say)
    assert "unexpected argument 'c'" in refused(say, "a", "b", "c")
    assert "an argument is empty" in refused(say, "a", "")


def test_help_prints_the_docstring_and_every_option_with_default_and_comment(say):
    for flag in "--help", "-h":
        result = say("x", "--batch_size=3", flag)
        assert result.returncode == 0 and "got" not in result.stdout
        assert "python say.py what [where]" in result.stdout.splitlines()[0]
        assert "Says what it was given.\n\n    python say.py words" in result.stdout
        rows = [line.split(maxsplit=1) for line in result.stdout.partition("options:\n")[2].splitlines()]
        assert rows[:-1] == [["--batch_size=8", "sequences at once"], ["--learning_rate=0.5", "of the optimizer"],
                             ["--fast=False", "whether to hurry"], ["--name=\\n", "of the run"],
                             ["--budget=", "at most so many parameters"], ["--top_k=", "sample among these"]]
        assert rows[-1][0] == "--traceback"
    usage = run_here("experiments/compare.py", "--help").stdout.partition("\n")[0]
    assert usage == "usage: python -m experiments.compare [config.py ...] [--option=value ...]"


@pytest.mark.parametrize("what, status, line", [
    ("missing", 2, "no such thing"), ("disk", 1, "the disk is full: out"), ("odd", 1, "odd"), ("wrong", 2, "two lines"),
    ("diverged", 1, "not finite"), ("memory", 1, "out of memory: lower --batch_size ()"),
    ("cuda", 1, "out of memory: lower --batch_size (CUDA out of memory)")])
def test_exit_status_tells_wrong_arguments_from_failures(what, status, line, say):
    said = say(what)
    assert (said.returncode, said.stderr) == (status, f"error: {line}\n")


@pytest.mark.parametrize("what, words, file, code", [
    ("model", "ValueError: n_head=3 does not divide n_embd=16 ", "model.py", "raise ValueError"),
    ("panic", "Panic: index out of bounds ", "say.py", "raise Panic(message)"),
    ("key", "KeyError: 'a key' ", "say.py", '{}["a key"]'),
    ("torch", "RuntimeError: Error(s) in loading state_dict for Linear: ", "say.py", "load_state_dict({})"),
    ("silent", "AssertionError ", "say.py", "raise error"),
    ("long", f"TypeError: {300 * 'x'}... ", "say.py", "raise error")])
def test_any_other_error_is_one_line_that_names_our_file_and_line(what, words, file, code, say, workdir):
    folder = ROOT if file == "model.py" else workdir
    if what == "model":
        words = words.replace("n_head=3 does not divide n_embd=16", str(model_error()))
    line = refused(say, what, status=1)
    source = (folder / file).read_text(encoding="utf-8").splitlines()
    place = line.rpartition(" (")[2].partition(";")[0]
    assert line.startswith(f"error: {words}(") and line.endswith("; --traceback shows all of it)")
    assert place.startswith("model.py:" if folder == ROOT else f"{workdir}/say.py:")
    assert code in source[int(place.rpartition(":")[2]) - 1]


def model_error():
    from model import KronyGPTConfig

    with pytest.raises(Exception) as caught:
        KronyGPTConfig(n_head=3, n_embd=16)
    return caught.value


def test_traceback_shows_all_of_an_error(say, monkeypatch):
    for what, status in (("key", 1), ("panic", 1), ("wrong", 2)):
        said = say(what, "--traceback")
        assert said.returncode == status and said.stderr.startswith("Traceback"), said.stderr
        assert "say.py" in said.stderr and "in main" in said.stderr
    assert say("x", "--traceback").returncode == 0
    monkeypatch.setenv("KRONYGPT_TRACEBACK", "1")
    assert say("key").stderr.startswith("Traceback")
    monkeypatch.setenv("KRONYGPT_TRACEBACK", "0")
    assert say("key").stderr.startswith("error: ")


def start(workdir, *args, encoding="utf-8", **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    return subprocess.Popen([sys.executable, "say.py", *args], cwd=workdir, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_warning_is_one_line(say, workdir):
    with start(workdir, "warn") as script:
        assert script.communicate(timeout=60)[1] == "warning: two lines\n"


def test_a_log_pipe_that_cannot_encode_loses_no_line(say, workdir):
    for args, stream, said in ((["x", "‖"], 0, "got x \\u2016 "), (["‖.py"], 1, "error: no config file \\u2016.py\n")):
        with start(workdir, *args, encoding="ascii") as script:
            assert script.communicate(timeout=60)[stream].startswith(said)


def test_a_reader_that_goes_away_is_no_traceback(say, workdir):
    with start(workdir, "lines") as script:
        assert script.stdout.readline().startswith("got lines")
        script.stdout.close()
        assert script.stderr.read() == ""
        assert script.wait(timeout=60) == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_ends_a_script_after_it_has_cleaned_up(name, say, workdir):
    number = getattr(signal, name)
    with start(workdir, "wait") as script:
        assert script.stdout.readline() == "waiting\n"
        script.send_signal(number)
        out, err = script.communicate(timeout=60)
    assert (out, err, script.returncode) == ("cleaned up\n", "", 128 + number)


def test_what_nohup_ignores_stays_ignored(say, workdir):
    with start(workdir, "wait", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as script:
        assert script.stdout.readline() == "waiting\n"
        script.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            script.wait(timeout=0.5)
        script.terminate()
        assert script.wait(timeout=60) == 128 + signal.SIGTERM
