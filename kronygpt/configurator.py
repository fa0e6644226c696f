"""Options and errors of every script: its own defaults, then config files and --key=value in the order given.

A script's lower-case module-level values of type bool, int, float and str are its options; an option without a
default is annotated with its type (`budget: str | None = None`). A script ends with

    if __name__ == "__main__":
        run(main)

and the parameters of main() are its positional arguments. Config files are Python that assigns options, as in nanoGPT:

    python train.py config/train_gpt2.py --batch_size=32 --wandb_run_name=first
    python train.py --help

A config file is an argument that ends in .py; for a script without positional arguments the ending is optional. Nothing
else that stands on a command line is executed.
"""
import ast
import difflib
import errno
import inspect
import math
import operator
import os
import re
import signal
import sys
import threading
import tokenize
import warnings
from pathlib import Path
from typing import get_args

OPTION_TYPES = (bool, int, float, str)
INT_BITS = 63  # of a whole number
SHOWN = 60  # characters of a wrong value
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


def check_range(namespace, names, at_least=None, above=None, at_most=None, below=None):
    """Raise UserError unless options are finite numbers in a range; None, an option without a value, passes.

    Args:
        namespace: the globals of a script.
        names: of options in it, separated by spaces.
        at_least, above, at_most, below: the bounds.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    bounds = {words: bound for words, bound in bounds.items() if bound is not None}
    for name in names.split():
        value = namespace[name]
        holds = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
        if value is not None and not (-math.inf < value < math.inf and all(holds[w](value, b) for w, b in bounds.items())):
            wanted = " and ".join(f"{words} {bound}" for words, bound in bounds.items()) or "a finite number"
            raise UserError(f"--{name} is {wanted}, not {value}")


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
    nearest = difflib.get_close_matches(name, types, n=1, cutoff=0.5)
    hint = f"did you mean --{nearest[0]}?" if nearest else "--help lists the options"
    return UserError(f"unknown option --{name}{where}: {hint}")


def parse_value(name, text, wanted):
    """The value that a command line's text stands for, in the type of the option."""
    if wanted is str:
        return text
    try:
        with warnings.catch_warnings(action="ignore"):  # of strings with odd escapes
            value = ast.literal_eval(text.capitalize() if wanted is bool else text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the latter two for nested brackets
        value = text
    return value


def shortened(value):
    text = repr(value) if type(value) is not int or value.bit_length() <= INT_BITS else "a number of many digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def checked_value(name, value, wanted, may_be_empty, where=""):
    """The value of an option, if it has the option's type and can be meant; else UserError."""
    is_number = type(value) in (int, float)
    if type(value) is int and value.bit_length() > INT_BITS:
        raise UserError(f"--{name} is a number with more digits than can be meant{where}")
    if is_number and wanted is float:
        return float(value)
    if type(value) is not wanted:
        example = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}[wanted]
        raise UserError(f"--{name} takes {example}, not {shortened(value)}{where}")
    if value == "" and name not in may_be_empty:
        raise UserError(f"--{name} is empty{where}: give it a value, or omit it for the default")
    return value


def read_config_file(path, namespace, types, may_be_empty):
    """Execute a config file with the current options as its globals, and return the options that it assigned."""
    where = f" (in {path})"
    try:
        if not Path(path).is_file():
            raise UserError(f"no config file {path}")
        code = compile(Path(path).read_bytes(), str(path), "exec")  # bytes: their coding line or byte order mark counts
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno or '?'}: {error.msg}") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"cannot read config file {path}: {type(error).__name__}: {error}") from None
    before = {name: namespace[name] for name in types}
    optional = namespace.get("__annotations__", {})  # options that may be None
    scope = dict(before, __file__=str(path), __name__="config")
    try:
        exec(code, scope)
    except (Exception, SystemExit) as error:  # an error in the user's program is the user's
        line = next((t.tb_lineno for t in iterate_traceback(error) if t.tb_frame.f_code is code), "?")
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    for name, value in scope.items():
        if name not in types and not name.startswith("_") and type(value) in OPTION_TYPES:
            raise unknown_option(name, types, where)
    assigned = {name: scope[name] for name in types if scope.get(name, before[name]) is not before[name]}
    return {name: value if value is None and name in optional
            else checked_value(name, value, types[name], may_be_empty, where) for name, value in assigned.items()}


def iterate_traceback(error):
    step = error.__traceback__
    while step:
        yield step
        step = step.tb_next


def as_config_file(arg, takes_positionals):
    """The path of the config file that an argument names, or None where it is a positional argument: a model called
    models/foo is not taken for models/foo.py."""
    if arg.endswith(".py"):
        return arg
    return f"{arg}.py" if not takes_positionals and os.path.isfile(f"{arg}.py") else None


def configure(namespace, argv, takes_positionals=True):
    """Set the options in a module's globals from its command line.

    Args:
        namespace: the globals of the script; its options are overwritten in place. Its MAY_BE_EMPTY names those that may
            be empty strings, besides those that are by default.
        argv: the arguments after the script's name.
        takes_positionals: whether the script has positional arguments at all.

    Returns:
        The positional arguments, a list of strings.

    Raises:
        UserError: unknown option, wrong type, missing or failing config file.
    """
    types = option_types(namespace)
    defaults = {name: namespace[name] for name in types}
    may_be_empty = {*namespace.get("MAY_BE_EMPTY", ()), *(name for name in types if defaults[name] == "")}
    given.clear()
    positionals = []
    for arg in argv:
        if arg.startswith("--"):
            name, equals, text = arg[2:].partition("=")
            if name not in types:
                raise unknown_option(name, types)
            if not equals and types[name] is not bool:
                raise UserError(f"--{name} needs a value: --{name}=...")
            value = parse_value(name, text, types[name]) if equals else True
            namespace[name] = checked_value(name, value, types[name], may_be_empty)
            given.add(name)
        elif config := as_config_file(arg, takes_positionals):
            assigned = read_config_file(config, namespace, types, may_be_empty)
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
    with tokenize.open(path) as file:
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(file.readline)
                    if t.type == tokenize.COMMENT}
        file.seek(0)
        tree = ast.parse(file.read())
    targets = [(node, target) for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign))
               for target in getattr(node, "targets", [getattr(node, "target", None)])]
    return {target.id: comments.get(node.end_lineno, "") for node, target in targets if isinstance(target, ast.Name)}


def usage(main):
    """The usage line of a script: its name, its positional arguments, and what every script takes."""
    words = [os.path.basename(main.__code__.co_filename)]
    for name, parameter in inspect.signature(main).parameters.items():
        optional = parameter.default is not inspect.Parameter.empty
        words.append(f"[{name}]" if optional else name)
    return " ".join(words) + " [config.py ...] [--option=value ...]"


def print_help(main):
    namespace = main.__globals__
    print(f"usage: {usage(main)}\n\n{(namespace['__doc__'] or '').strip()}\n\noptions:")
    comments = option_comments(main.__code__.co_filename)
    rows = [(f"--{name}={'' if namespace[name] is None else namespace[name]}", comments.get(name, ""))
            for name in option_types(namespace)]
    width = min(36, max((len(left) for left, _ in rows), default=0))
    for left, comment in rows:
        print(f"  {left:<{width}}  {comment}".rstrip())


def run(main):
    """Run a script: configure its module's options, call main with the positional arguments, and exit.

    Errors that a person can act on become one line on stderr: UserError with its status, FileNotFoundError and its
    kind with exit status 2, any other OSError with 1, and memory that is too small, for which a script says in its
    OUT_OF_MEMORY what helps. Everything else is a bug and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a pipe in latin-1 or ASCII gets \u2016 for what it cannot write
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *where: f"warning: {message}\n"
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(SIGNALLED + number))  # what is half-written is removed
    argv = sys.argv[1:]
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
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except BrokenPipeError:  # the reader of our output has gone (`... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
        if getattr(error, "errno", None) in FULL:
            exit_with(f"the disk is full: {error.filename or error}", status=1)
        exit_with(error, getattr(error, "status", 2 if is_missing else 1))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = main.__globals__.get("OUT_OF_MEMORY", "use a smaller model or batch, or a device with more memory")
        exit_with(f"out of memory: {advice} ({str(error).strip().partition(chr(10))[0]})", status=1)


def exit_with(message, status):
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)


def is_out_of_memory(error):
    """Whether an error says that memory is too small: Python's, or torch's of a GPU, of mps or of the CPU."""
    return isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error))
