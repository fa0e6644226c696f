"""Options and errors of every script: its own defaults, then config files and --key=value in the order given.

A script's lower-case module-level values of type bool, int, float and str are its options; an option without a
default is annotated with its type (`budget: str | None = None`). A script ends with

    if __name__ == "__main__":
        run(main)

and the parameters of main() are its positional arguments. Config files are Python that assigns options, as in nanoGPT:

    python train.py config/train_gpt2.py --batch_size=32 --wandb_run_name=first
    python train.py --help

A config file is an argument that ends in .py; for a script without positional arguments the ending is optional. Nothing
else that stands on a command line is executed: a model called models/foo is not taken for models/foo.py.
"""
import ast
import difflib
import errno
import inspect
import math
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parent.parent
OPTION_TYPES = (bool, int, float, str)
SHOWN = 60, 300  # characters of a wrong value, and of the message of an error that is not ours
ENDING = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # what shells, Slurm and a lost connection send
SIGNALLED = 128  # and the number of a signal: the exit status of a script that it ended
FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a disk that is full, or of a quota

given = set()  # names of the options that the command line or a config file has set


class UserError(Exception):
    """An error that a person can act on: one line that says what is wrong, where, and what to do.

    `status` is the script's exit status: 2 for wrong arguments and missing files, 1 for anything else.
    """

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def check_range(namespace, names, at_least=-math.inf, above=-math.inf, at_most=math.inf, below=math.inf):
    for name in names.split():
        value = namespace[name]
        if value is not None and not (at_least <= value <= at_most and above < value < below):
            raise UserError(f"--{name}={value} is out of range")


def check_choice(namespace, name, *choices):
    """Raise UserError unless an option is one of some words."""
    if namespace[name] not in choices:
        raise UserError(f"--{name} is {', '.join(choices[:-1])} or {choices[-1]}, not {namespace[name]}")


def option_types(namespace):
    """The options among a module's globals: {name: type}, in the order of their definition."""
    types = {}
    for name, value in namespace.items():
        if name.startswith("_") or name != name.lower():
            continue
        if type(value) in OPTION_TYPES:
            types[name] = type(value)
        elif value is None and name in namespace.get("__annotations__", {}):
            declared = namespace["__annotations__"][name]
            types[name] = next(t for t in get_args(declared) if t in OPTION_TYPES)
    return types


def unknown_option(name, types, where=""):
    """An error that suggests an option: by its whole name, one of its words, or its initials (--lr for --learning_rate)."""
    words = {}
    for option in types:
        parts = option.split("_")
        for word in (option, *parts, "".join(part[0] for part in parts)):
            if word == option or word not in words:
                words[word] = option
    nearest = difflib.get_close_matches(name.lower().replace("-", "_"), words, n=1)
    hint = f"did you mean --{words[nearest[0]]}?" if nearest else "--help lists the options"
    return UserError(f"unknown option --{name}{where}: {hint}")


def parse_value(text, wanted):
    """The value that a command line's text stands for, in the type of the option, or else the text itself."""
    if wanted is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return wanted(text)
    except ValueError:
        return text


def checked_value(name, value, wanted, where=""):
    """The value of an option, if it has the option's type; else UserError."""
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted or (wanted is float and not math.isfinite(value)):
        example = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}[wanted]
        raise UserError(f"--{name} takes {example}, not {shortened(repr(value))}{where}")
    return value


def shortened(text, length=SHOWN[0]):
    text = str(text)
    return text if len(text) <= length else f"{text[:length]}..."


def read_config_file(path, namespace, types):
    """Execute a config file with the current options as its globals, and return the options that it assigned."""
    where = f" (in {path})"
    if not Path(path).is_file():
        raise UserError(f"no config file {path}")
    before = {name: namespace[name] for name in types}
    scope = dict(before, __file__=str(path), __name__="config")
    try:
        code = Path(path).read_bytes()  # Python reads their coding line or byte order mark
        exec(compile(code, str(path), "exec"), scope)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno or '?'}: {error.msg}") from None
    except (Exception, SystemExit) as error:  # an error in the user's program is the user's
        _, line = place_of(error, lambda file: file == str(path))
        raise UserError(f"{path}, line {line}: {described(error)}") from None
    for name, value in scope.items():
        if name not in types and not name.startswith("_") and type(value) in OPTION_TYPES:
            raise unknown_option(name, types, where)
    optional = namespace.get("__annotations__", {})  # options that may be None
    assigned = {name: scope[name] for name in types if scope.get(name, before[name]) is not before[name]}
    return {name: value if value is None and name in optional else checked_value(name, value, types[name], where)
            for name, value in assigned.items()}


def configure(namespace, argv, takes_positionals=True):
    """Set the options in a module's globals from its command line.

    Args:
        namespace: the globals of the script; its options are overwritten in place.
        argv: the arguments after the script's name.
        takes_positionals: whether the script has positional arguments at all.

    Returns:
        The positional arguments, a list of strings.

    Raises:
        UserError: unknown option, wrong type, missing or failing config file.
    """
    types = option_types(namespace)
    defaults = {name: namespace[name] for name in types}
    given.clear()
    positionals = []
    for arg in argv:
        if arg.startswith("--"):
            name, equals, text = arg[2:].partition("=")
            if name not in types:
                raise unknown_option(name, types)
            if not equals and types[name] is not bool:
                raise UserError(f"--{name} needs a value: --{name}=...")
            namespace[name] = checked_value(name, parse_value(text, types[name]) if equals else True, types[name])
            given.add(name)
        elif arg.endswith(".py") or (not takes_positionals and os.path.isfile(f"{arg}.py")):
            assigned = read_config_file(arg.removesuffix(".py") + ".py", namespace, types)
            namespace.update(assigned)
            given.update(assigned)
        elif not arg.strip():
            raise UserError("an argument is empty: is a variable of the shell not set?")
        else:
            positionals.append(arg)
    changed = {name: namespace[name] for name in types if namespace[name] != defaults[name]}
    if changed and os.environ.get("RANK", "0") == "0":
        print("options:", ", ".join(f"{name}={in_one_line(value)}" for name, value in changed.items()))
    return positionals


def in_one_line(value):
    n_lines = len(str(value).strip().splitlines())
    return f"({n_lines} lines)" if n_lines > 1 else str(value).replace("\n", "\\n")


def option_comments(path):
    """The comment after each module-level assignment of a script: {name: comment}."""
    source = Path(path).read_bytes()
    lines = source.splitlines()
    return {target.id: lines[node.end_lineno - 1][node.end_col_offset:].decode().lstrip("# ")
            for node in ast.parse(source).body if isinstance(node, (ast.Assign, ast.AnnAssign))
            for target in getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(target, ast.Name)}


def usage(main):
    """The usage line of a script: its name, its positional arguments, and what every script takes."""
    path = Path(main.__code__.co_filename).resolve()
    words = ["python", "-m", f"experiments.{path.stem}"] if path.parent == ROOT / "experiments" else ["python", path.name]
    for name, parameter in inspect.signature(main).parameters.items():
        optional = parameter.default is not inspect.Parameter.empty
        words.append(f"[{name}]" if optional else name)
    return " ".join(words) + " [config.py ...] [--option=value ...]"


def print_help(main):
    namespace = main.__globals__
    print(f"usage: {usage(main)}\n\n{(namespace['__doc__'] or '').strip()}\n\noptions:")
    comments = option_comments(main.__code__.co_filename)
    rows = [(f"--{name}={'' if namespace[name] is None else in_one_line(namespace[name])}", comments.get(name, ""))
            for name in option_types(namespace)]
    rows.append(("--traceback", "show all of an error, as KRONYGPT_TRACEBACK=1 does"))
    width = min(36, max(len(left) for left, _ in rows))
    for left, comment in rows:
        print(f"  {left:<{width}}  {comment}".rstrip())


def run(main):
    """Run a script: configure its module's options, call main with the positional arguments, and exit.

    An error becomes one line on stderr. The exit status is that of a UserError, 2 for FileNotFoundError and its kind, 1 for
    any other error, and 128 + N for signal N. --traceback, or KRONYGPT_TRACEBACK=1, shows the whole traceback instead.
    """
    for stream in (sys.stdout, sys.stderr):  # a pipe in latin-1 or ASCII gets \u2016 for what it cannot write
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # a log shows progress as it is made
    warnings.formatwarning = lambda message, *where: f"warning: {' '.join(str(message).split())}\n"
    end_at_signals()
    argv = [arg for arg in sys.argv[1:] if arg != "--traceback"]
    parameters = inspect.signature(main).parameters
    try:
        if "--help" in argv or "-h" in argv:
            return print_help(main)
        positionals = configure(main.__globals__, argv, takes_positionals=bool(parameters))
        required = sum(p.default is inspect.Parameter.empty for p in parameters.values())
        if not required <= len(positionals) <= len(parameters):
            extra = positionals[len(parameters):]
            problem = f"unexpected argument {extra[0]!r}" if extra else "missing argument"
            if extra and not parameters:
                problem = f"no config file {extra[0]}"
            raise UserError(f"{problem}; usage: {usage(main)}")
        main(*positionals)
    except SystemExit:
        raise
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except BrokenPipeError:  # the reader of our output has gone (`... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except BaseException as error:  # panics of libraries in Rust are no Exceptions
        if len(argv) < len(sys.argv) - 1 or os.environ.get("KRONYGPT_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        else:
            print("error:", report(error, main), file=sys.stderr)
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
        sys.exit(getattr(error, "status", 2 if is_missing else 1))


def end_at_signals():
    """Let signals end a script with 128 + N, after what it has half-written is removed; what nohup ignores stays ignored."""
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in ENDING if hasattr(signal, name)):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: sys.exit(SIGNALLED + number))


def report(error, main):
    """What an error says in one line: with the place in our code, unless the user or the system is at fault."""
    if is_out_of_memory(error):
        advice = main.__globals__.get("OUT_OF_MEMORY", "use a smaller model or batch, or a device with more memory")
        return f"out of memory: {advice} ({first_line(error)})"
    if getattr(error, "errno", None) in FULL:
        return f"the disk is full: {error.filename or error}"
    if isinstance(error, (UserError, OSError)):
        return " ".join(str(error).split())
    file, line = place_of(error, lambda file: is_ours(file) or file == main.__code__.co_filename)
    return f"{described(error)} ({file}:{line}; --traceback shows all of it)"


def described(error):
    return f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")


def first_line(error):
    return shortened(str(error).strip().partition("\n")[0], SHOWN[1])


def is_ours(file):
    inside = Path(file).resolve()
    return inside.is_relative_to(ROOT) and "site-packages" not in inside.parts


def place_of(error, is_wanted):
    """(file, line) of the innermost call in an error's traceback whose file is wanted."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_wanted(frame.filename):
            return os.path.relpath(frame.filename, ROOT) if is_ours(frame.filename) else frame.filename, frame.lineno
    return "?", "?"


def is_out_of_memory(error):
    """Whether an error says that memory is too small: Python's, or torch's of a GPU, of mps or of the CPU."""
    is_said = isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error))
    return isinstance(error, MemoryError) or bool(is_said)
