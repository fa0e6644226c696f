"""Options of scripts, through a small script that is run as a person would."""
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from conftest import ROOT, run_here

from kronygpt import configurator
from kronygpt.configurator import UserError, check_choice, check_range, configure

SCRIPT = '''
"""Says what it was given.

    python say.py words
"""
from kronygpt.configurator import UserError, run

batch_size = 8  # sequences at once
learning_rate = 0.5  # of the optimizer
fast = False  # whether to hurry
name = "first"  # of the run
budget: str | None = None  # at most so many parameters
top_k: int | None = None  # sample among these
LIMIT = 3
_private = 4


def main(what, where="nowhere"):
    failures = {"bug": KeyError("a bug"), "missing": FileNotFoundError("no such thing"), "disk": OSError("disk full"),
                "wrong": UserError("two\\nlines"), "diverged": UserError("not finite", status=1)}
    if what in failures:
        raise failures[what]
    for i in range(10**5 if what == "lines" else 1):
        print("got", what, where, repr([batch_size, learning_rate, fast, name, budget, top_k]))


if __name__ == "__main__":
    run(main)
'''


@pytest.fixture
def say(workdir, run_script):
    (workdir / "say.py").write_text(SCRIPT)
    return lambda *args, **options: run_script(workdir / "say.py", *args, cwd=workdir, **options)


@pytest.fixture
def config(workdir):
    """Writes a config file, and returns its path as a string."""
    def write(name, text):
        (workdir / name).write_text(dedent(text))
        return f"./{name}"

    return write


def options(**changes):
    """The globals of a script with options of every kind."""
    return dict(batch_size=8, learning_rate=0.5, fast=False, name="first", budget=None, top_k=None, LIMIT=3, _private=4,
                __annotations__={"budget": str | None, "top_k": int | None}, **changes)


def configured(*argv):
    namespace = options()
    return namespace, configure(namespace, argv)


def refused(say, *args):
    """The one line on stderr of a command that is not obeyed."""
    result = say(*args)
    assert result.returncode == 2, result
    line, = result.stderr.splitlines()
    assert "got" not in result.stdout
    return line


def test_the_last_of_options_and_config_files_wins(config):
    small, large = config("small.py", "batch_size = 2\nname = 'small'"), config("large.py", "batch_size = 64")
    for argv, batch_size, name in ([small, large], 64, "small"), ([large, small], 2, "small"), \
            ([small, "--batch_size=3"], 3, "small"), (["--batch_size=3", small], 2, "small"), \
            (["--name=mine", large], 64, "mine"):
        namespace, positionals = configured(*argv)
        assert (namespace["batch_size"], namespace["name"], positionals) == (batch_size, name, [])


def test_positionals_may_stand_anywhere(config):
    small = config("small.py", "batch_size = 2")
    namespace, positionals = configured("--name=a", "one", small, "two", "--fast=True")
    assert positionals == ["one", "two"]
    assert (namespace["batch_size"], namespace["name"], namespace["fast"]) == (2, "a", True)


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
        Path("models", name).write_text("from pathlib import Path\nPath('pwned').touch()\n")
    for command in (["perplexity.py", "models/foo", "models/text"], ["sample.py", "models/foo"],
                    ["kron_to_gpt.py", "models/foo", "models/text"], ["kron_to_gpt.py", "models/text", "models/foo"],
                    ["kron_decompose.py", "models/768", "models/768", "models/768", "--init_from=models/foo"],
                    ["prune.py", "--init_from=models/foo", "--teacher=models/foo"], ["experiments/bench.py", "models/foo"]):
        said = run_here(*command)
        assert said.returncode in (1, 2) and "Traceback" not in said.stderr
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


@pytest.mark.parametrize("text", [
    "name = ''", "budget = ''", "batch_size = 10**5000", "batch_size = " + "(" * 300 + "1" + ")" * 300,
    "batch_size = " + "-" * 100_000 + "1", "learning_rate = 10**400", "batch_size = b'x'", "\0", "raise SystemExit",
    "def f(): f()\nf()", "batch_size = [1] * 10**6", "import torch\nbatch_size = torch.ones(300)",
])
def test_a_config_file_that_cannot_be_meant_gets_one_short_line(text, workdir):
    Path("small.py").write_text(text)
    with pytest.raises(UserError) as caught:
        configured("small.py")
    assert "small.py" in str(caught.value) and len(str(caught.value)) < 300


def test_a_config_file_that_is_a_pipe_does_not_hang(workdir):
    os.mkfifo("small.py")
    with pytest.raises(UserError, match=r"no config file small\.py"):
        configured("small.py")


@pytest.mark.parametrize("value", ["9" * 25, "9" * 5000, "-" + "9" * 25, "(" * 5000, "-" * 100_000 + "1",
                                   "[" * 300 + "]" * 300, "1e", "\\d", "'" * 3, "10**12", "inf", "0x", "True"])
def test_a_whole_number_that_cannot_be_meant_gets_one_short_line(value, workdir):
    with pytest.raises(UserError, match="--batch_size ") as caught:
        configured(f"--batch_size={value}")
    assert len(str(caught.value)) < 150


def test_a_number_beyond_a_float_gets_one_line(workdir):
    with pytest.raises(UserError, match="--learning_rate is a number with more digits"):
        configured("--learning_rate=1" + "0" * 400)


def test_an_empty_value_is_refused_unless_it_is_meant(workdir):
    for name in ("name", "budget"):
        with pytest.raises(UserError, match=f"--{name} is empty"):
            configured(f"--{name}=")
    with pytest.raises(UserError, match="an argument is empty"):
        configured("one", "")
    for changes in (dict(device=""), dict(device="cuda", MAY_BE_EMPTY=("device",))):
        namespace = options(**changes)
        configure(namespace, ["--device="])
        assert namespace["device"] == ""


def test_what_was_given_is_known(config):
    config("small.py", "batch_size = 2")
    configured("./small.py", "--name=a")
    assert configurator.given == {"batch_size", "name"}
    configured()
    assert not configurator.given


def test_a_config_file_sees_the_options_so_far_and_may_compute(config):
    config("double.py", """
        import math
        sizes = [1, 2]
        _half = batch_size // 2
        batch_size = 2 * batch_size + len(sizes)
        learning_rate = math.sqrt(4)
    """)
    namespace, _ = configured("--batch_size=5", "./double.py")
    assert (namespace["batch_size"], namespace["learning_rate"]) == (12, 2.0)
    assert not {"sizes", "math", "_half"} & namespace.keys()


@pytest.mark.parametrize("argument, option, value", [
    ("--batch_size=-3", "batch_size", -3),
    ("--learning_rate=6e-5", "learning_rate", 6e-5),
    ("--learning_rate=2", "learning_rate", 2.0),
    ("--fast=True", "fast", True),
    ("--fast=false", "fast", False),
    ("--fast", "fast", True),
    ("--name=12", "name", "12"),
    ("--name=a=b c", "name", "a=b c"),
    ("--budget=82", "budget", "82"),
    ("--top_k=40", "top_k", 40),
])
def test_values_take_the_type_of_the_option(argument, option, value):
    namespace, _ = configured(argument)
    assert namespace == options() | {option: value}
    assert type(namespace[option]) is type(value)


def test_a_config_file_may_give_a_whole_number_for_a_float(config):
    namespace, _ = configured(config("one.py", "learning_rate = 1"))
    assert type(namespace["learning_rate"]) is float


def test_an_error_of_the_user_is_a_wrong_argument_unless_it_says_otherwise():
    assert UserError("x").status == 2 and UserError("x", status=1).status == 1 and str(UserError("x")) == "x"


@pytest.mark.parametrize("bounds, good, bad, words", [
    (dict(at_least=1), [1, 2, 1.5, 10**9], [0, 0.999, -1], "at least 1"),
    (dict(above=0), [1e-30, 1], [0, -1], "above 0"),
    (dict(at_least=0, at_most=1), [0, 0.5, 1], [-0.1, 1.1], "at least 0 and at most 1"),
    (dict(at_least=0, below=1), [0, 0.999], [1, -1], "at least 0 and below 1"),
    ({}, [0, -1e300], [], "a finite number"),
])
def test_a_number_out_of_its_range_is_refused(bounds, good, bad, words):
    for value in [*good, None]:
        check_range(dict(other=None, rate=value), "other rate", **bounds)
    for value in [*bad, float("inf"), -float("inf"), float("nan")]:
        with pytest.raises(UserError, match=f"^--rate is {words}, not {value}$"):
            check_range(dict(other=None, rate=value), "other rate", **bounds)


def test_a_word_that_is_no_choice_is_refused():
    for value in "off", "online", "offline":
        check_choice(dict(mode=value), "mode", "off", "online", "offline")
    for value in "on", "", "Off":
        with pytest.raises(UserError, match=f"^--mode is off, online or offline, not {value}$"):
            check_choice(dict(mode=value), "mode", "off", "online", "offline")


@pytest.mark.parametrize("argument", [
    "--batch_size=2.5", "--batch_size=many", "--batch_size=", "--batch_size=True", "--learning_rate=fast",
    "--learning_rate=True", "--fast=1", "--fast=yes", "--top_k=2.5", "--top_k=all", "--batch_size=[1]",
])
def test_a_value_of_another_type_is_refused(argument):
    option = argument[2:].partition("=")[0]
    with pytest.raises(UserError, match=f"^--{option} takes "):
        configured(argument)


@pytest.mark.parametrize("text", ["batch_size = 2.5", "batch_size = '2'", "name = 3", "fast = 1", "learning_rate = None"])
def test_a_config_value_of_another_type_is_refused(config, text):
    with pytest.raises(UserError, match=f"^--{text.split()[0]} takes .*wrong.py"):
        configured(config("wrong.py", text))


def test_only_changed_options_are_printed(say, config):
    config("c.py", "batch_size = 8\nlearning_rate = 0.25")
    assert say("x", "./c.py", "--name=first", "--top_k=3").stdout.splitlines() == [
        "options: learning_rate=0.25, top_k=3", "got x nowhere [8, 0.25, False, 'first', None, 3]"]
    assert say("x", "here").stdout == "got x here [8, 0.5, False, 'first', None, None]\n"
    assert "options:" not in say("x", "--top_k=3", env={"RANK": "1"}).stdout
    for name, shown in (("\\n", "\\n"), ("a\nb\n", "(2 lines)")):
        assert say("x", f"--name={name}").stdout.splitlines()[0] == f"options: name={shown}"


def test_an_unknown_option_names_the_nearest(say, config):
    assert "--batchsize" in (line := refused(say, "x", "--batchsize=3")) and "did you mean --batch_size?" in line
    assert "did you mean --learning_rate?" in refused(say, "x", "--learning-rate=3")
    assert "--help" in refused(say, "x", "--zzz=3")
    assert "did you mean --batch_size?" in (line := refused(say, "x", config("c.py", "batch_sise = 4"))) and "c.py" in line
    assert "--LIMIT" in refused(say, "x", "--LIMIT=3")


def test_a_command_that_cannot_be_obeyed_is_one_line(say, config):
    assert "--batch_size needs a value" in refused(say, "x", "--batch_size")
    assert "no config file lost.py" in refused(say, "x", "lost.py")
    assert "missing argument" in refused(say) and "say.py what [where]" in refused(say)
    assert "unexpected argument 'c'" in refused(say, "a", "b", "c")


def test_a_failing_config_file_is_one_line_that_names_the_place(say, config):
    raises = config("raises.py", "batch_size = 2\n\ndef f():\n    return 1 / 0\n\nname = f()\n")
    line = refused(say, "x", raises)
    assert "raises.py, line 6: ZeroDivisionError: division by zero" in line
    assert "syntax.py, line 2: " in refused(say, "x", config("syntax.py", "batch_size = 2\nname = = 3\n"))


def test_a_config_file_that_raises_more_than_a_line_is_one_line(say, config):
    assert "lines.py, line 1: ValueError: one" in refused(say, "x", config("lines.py", "raise ValueError('one\\ntwo')"))


def test_help_prints_the_docstring_and_every_option_with_default_and_comment(say):
    for flag in "--help", "-h":
        result = say("x", "--batch_size=3", flag)
        assert result.returncode == 0 and "got" not in result.stdout
        assert "say.py what [where]" in result.stdout.splitlines()[0]
        assert "Says what it was given.\n\n    python say.py words" in result.stdout
        rows = [line.split(maxsplit=1) for line in result.stdout.partition("options:\n")[2].splitlines()]
        assert rows == [["--batch_size=8", "sequences at once"], ["--learning_rate=0.5", "of the optimizer"],
                        ["--fast=False", "whether to hurry"], ["--name=first", "of the run"],
                        ["--budget=", "at most so many parameters"], ["--top_k=", "sample among these"]]


def test_exit_status_tells_wrong_arguments_from_failures_from_bugs(say):
    missing, disk, bug = say("missing"), say("disk"), say("bug")
    assert (missing.returncode, missing.stderr) == (2, "error: no such thing\n")
    assert (disk.returncode, disk.stderr) == (1, "error: disk full\n")
    wrong, diverged = say("wrong"), say("diverged")
    assert (wrong.returncode, wrong.stderr) == (2, "error: two lines\n")
    assert (diverged.returncode, diverged.stderr) == (1, "error: not finite\n")
    assert bug.returncode == 1
    assert bug.stderr.startswith("Traceback") and "KeyError: 'a bug'" in bug.stderr


def test_a_reader_that_goes_away_is_no_traceback(say, workdir):
    script = subprocess.Popen([sys.executable, "say.py", "lines"], cwd=workdir, env={**os.environ, "PYTHONPATH": ROOT},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert script.stdout.readline().startswith("got lines")
    script.stdout.close()
    assert script.stderr.read() == ""
    assert script.wait(timeout=60) == 1


def test_a_config_file_may_take_an_option_back_to_none(config):
    assert configured("--top_k=5", config("none.py", "top_k = None"))[0]["top_k"] is None


def test_a_config_file_that_exits_is_named(say, config):
    assert "exits.py, line 1: SystemExit: bye" in refused(say, "x", config("exits.py", "raise SystemExit('bye')"))
