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
import difflib
import inspect
import os
import re
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}  # by the type of an option
LIBRARY = re.compile(rf"<|{re.escape(os.path.dirname(os.__file__))}|.*(site|dist)-packages")  # files of Python and packages
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # what shells, Slurm and a lost connection send
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
LOG_SECONDS = 30  # between lines of progress in a log
SIGNALLED = 128  # and the number of a signal: the exit status of a script that it ended

given = set()  # names of the options that the command line or a config file has set


class UserError(Exception):
    """An error that a person can act on: one line that says what is wrong, where, and what to do.

    `status` is the script's exit status: 2 for wrong arguments and missing files, 1 for anything else.
    """

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


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
        if type(value) in EXAMPLES:
            types[name] = type(value)
        elif value is None and name in namespace.get("__annotations__", {}):
            types[name] = get_args(namespace["__annotations__"][name])[0]  # of `str | None`
    return types


def unknown_option(name, types, where=""):
    """An error that suggests an option: by its whole name, one of its words, or its initials (--lr for --learning_rate)."""
    words = {word: option for option in reversed(types)  # the first option that has a word
             for word in ("".join(part[0] for part in option.split("_")), *option.split("_"))}
    words |= {option: option for option in types}
    nearest = difflib.get_close_matches(name.lower().replace("-", "_"), words, n=1)
    hint = f"did you mean --{words[nearest[0]]}?" if nearest else "--help lists the options"
    return UserError(f"unknown option --{name}{where}: {hint}")


def typed(name, value, wanted, where=""):
    """The value of an option in the option's type, from that or from its text; else UserError."""
    with suppress(ValueError):
        if wanted is bool and isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower(), value)
        elif isinstance(value, str) or (wanted is float and type(value) is int):
            value = wanted(value)
    if type(value) is not wanted:
        raise UserError(f"--{name} takes {EXAMPLES[wanted]}, not {shortened(repr(value))}{where}")
    return value


def shortened(text, length=60):
    return text if len(text) <= length else f"{text[:length]}..."


def read_config_file(path, namespace, types):
    """Execute a config file with the current options as its globals, and return the options that it assigned."""
    before = {name: namespace[name] for name in types}
    scope = dict(before, __file__=path, __name__="config")
    exec(compile(Path(path).read_bytes(), path, "exec"), scope)  # Python reads a coding line or byte order mark
    where, optional = f" (in {path})", namespace.get("__annotations__", {})
    for name, value in scope.items():
        if name not in types and not name.startswith("_") and type(value) in EXAMPLES:
            raise unknown_option(name, types, where)
    return {name: value if value is None and name in optional else typed(name, value, types[name], where)
            for name, value in scope.items() if name in types and value is not before[name]}


def configure(namespace, argv, takes_positionals=True):
    """Set the options in a module's globals from its command line, and print those that differ from the defaults.

    Returns:
        The positional arguments, a list of strings.

    Raises:
        UserError: unknown option, or a value of a wrong type. Errors of a config file are as Python raises them.
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
            namespace[name] = typed(name, text if equals else True, types[name])
            given.add(name)
        elif arg.endswith(".py") or not takes_positionals:
            assigned = read_config_file(arg.removesuffix(".py") + ".py", namespace, types)
            namespace.update(assigned)
            given.update(assigned)
        else:
            positionals.append(arg)
    changed = {name: namespace[name] for name in types if namespace[name] != defaults[name]}
    if changed and os.environ.get("RANK", "0") == "0":
        print("options:", ", ".join(f"{name}={shortened(repr(value))}" for name, value in changed.items()))
    return positionals


def usage(main):
    """The usage line of a script: its name, its positional arguments, and what every script takes."""
    path = Path(main.__code__.co_filename).resolve()
    words = [f"python -m experiments.{path.stem}" if path.parent == ROOT / "experiments" else f"python {path.name}"]
    for name, parameter in inspect.signature(main).parameters.items():
        words.append(name if parameter.default is parameter.empty else f"[{name}]")
    return " ".join(words) + " [config.py ...] [--option=value ...]"


def print_help(main):
    namespace, source = main.__globals__, Path(main.__code__.co_filename).read_text(encoding="utf-8")
    print(f"usage: {usage(main)}\n\n{(namespace['__doc__'] or '').strip()}\n\noptions:")
    comments = dict(re.findall(r"^([a-z]\w*)\b.* = .*  # (.*)$", source, re.MULTILINE))
    rows = [(f"--{name}=" + ("" if namespace[name] is None else shortened(repr(namespace[name]))), comments.get(name, ""))
            for name in option_types(namespace)]
    rows.append(("--traceback", "show all of an error"))
    width = min(36, max(len(left) for left, _ in rows))
    for left, comment in rows:
        print(f"  {left:<{width}}  {comment}".rstrip())


def progress(items=None, unit_scale=False, **options):
    """A tqdm bar on a terminal; in a log, a line every LOG_SECONDS."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {elapsed} so far, {remaining} left\n"
        options |= dict(bar_format=line, miniters=1, delay=LOG_SECONDS, mininterval=LOG_SECONDS, maxinterval=LOG_SECONDS)
    return tqdm(items, unit_scale=unit_scale, leave=not sys.stderr.isatty(), **options)


def run(main):
    """Run a script: configure its module's options, call main with the positional arguments, and exit.

    An error becomes one line on stderr. The exit status is that of a UserError, 2 for FileNotFoundError and its kind, 1 for
    any other error, and 128 + N for signal N. --traceback, or KRONYGPT_TRACEBACK=1, shows the whole traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a pipe in latin-1 or ASCII gets \u2016 for what it cannot write
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # a log shows progress as it is made
    warnings.formatwarning = lambda message, *where: f"warning: {' '.join(str(message).split())}\n"
    handle_signals(lambda number, frame: sys.exit(SIGNALLED + number))  # after what is half-written is removed
    argv = [arg for arg in sys.argv[1:] if arg != "--traceback"]
    signature = inspect.signature(main)
    try:
        if "--help" in argv or "-h" in argv:
            return print_help(main)
        positionals = configure(main.__globals__, argv, takes_positionals=bool(signature.parameters))
        try:
            signature.bind(*positionals)
        except TypeError as error:
            raise UserError(f"{error}; usage: {usage(main)}") from None
        main(*positionals)
    except SystemExit:
        raise
    except BrokenPipeError:  # the reader of our output has gone (`... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except BaseException as error:  # panics of libraries in Rust are no Exceptions
        if "--traceback" in sys.argv or os.environ.get("KRONYGPT_TRACEBACK") == "1":
            traceback.print_exc()
        else:
            print("error:", report(error, main.__globals__.get("OUT_OF_MEMORY")), file=sys.stderr)
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
        sys.exit(getattr(error, "status", 2 if is_missing else 1))


def handle_signals(handler):
    """Set the handler of all SIGNALS but those that are ignored, as nohup ignores SIGHUP."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def report(error, out_of_memory=None):
    """What an error says in one line: with the place in our code, unless the user or the system is at fault. out_of_memory
    says what to do where memory is too small."""
    if isinstance(error, (UserError, OSError)):
        return " ".join(str(error).split())
    first_line = shortened(str(error).strip().partition("\n")[0], 300)
    is_told = isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error))  # by torch
    if isinstance(error, MemoryError) or is_told:
        return f"out of memory: {out_of_memory or 'use a smaller model or batch'} ({first_line})"
    place = [frame for frame in traceback.extract_tb(error.__traceback__) if not LIBRARY.match(frame.filename)][-1]
    file = place.filename.removeprefix(f"{ROOT}{os.sep}")
    return f"{type(error).__name__}: {first_line} ({file}:{place.lineno}; --traceback shows all of it)"
