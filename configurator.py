"""Options for every script: its own defaults, then config files and --key=value in the order given.

A script's lower-case module-level values of type bool, int, float and str are its options; an option without a
default is annotated with its type (`budget: str | None = None`). A script ends with

    if __name__ == "__main__":
        run(main)

and the parameters of main() are its positional arguments. Config files are Python that assigns options, as in nanoGPT:

    python train.py config/train_gpt2.py --batch_size=32 --wandb_run_name=first    # the .py may be left out
    python train.py --help
"""
import ast
import difflib
import inspect
import os
import sys
import tokenize
from pathlib import Path
from typing import get_args

OPTION_TYPES = (bool, int, float, str)


class UsageError(Exception):
    """A command line that cannot be obeyed; the message is one line that says what is wrong and what to do."""


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
    return UsageError(f"unknown option --{name}{where}: {hint}")


def parse_value(name, text, wanted):
    """The value that a command line's text stands for, in the type of the option."""
    if wanted is str:
        return text
    try:
        value = ast.literal_eval(text.capitalize() if wanted is bool else text)
    except (ValueError, SyntaxError):
        value = text
    return checked_value(name, value, wanted)


def checked_value(name, value, wanted, where=""):
    if type(value) is int and wanted is float:
        return float(value)
    if type(value) is not wanted:
        example = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}[wanted]
        raise UsageError(f"--{name} takes {example}, not {value!r}{where}")
    return value


def read_config_file(path, namespace, types):
    """Execute a config file over the options as they stand, and return those that it assigned."""
    where = f" (in {path})"
    try:
        code = compile(Path(path).read_text(), str(path), "exec")
    except FileNotFoundError:
        raise UsageError(f"no config file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read config file {path}: {error}") from None
    except SyntaxError as error:
        raise UsageError(f"{path}, line {error.lineno}: {error.msg}") from None
    before = {name: namespace[name] for name in types}
    optional = namespace.get("__annotations__", {})  # those that None is a value of
    scope = dict(before, __file__=str(path), __name__="config")
    try:
        exec(code, scope)
    except (Exception, SystemExit) as error:  # the file is the user's program: what it raises is reported as theirs
        line = next((t.tb_lineno for t in iterate_traceback(error) if t.tb_frame.f_code is code), "?")
        raise UsageError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    for name, value in scope.items():
        if name not in types and not name.startswith("_") and type(value) in OPTION_TYPES:
            raise unknown_option(name, types, where)
    assigned = {name: scope[name] for name in types if scope.get(name, before[name]) is not before[name]}
    return {name: value if value is None and name in optional else checked_value(name, value, types[name], where)
            for name, value in assigned.items()}


def iterate_traceback(error):
    step = error.__traceback__
    while step:
        yield step
        step = step.tb_next


def as_config_file(arg, takes_positionals):
    """The path of the config file that an argument names, or None where it is a positional argument.

    A bare word is a config file only to a script without positional arguments, so that a model called `model` is
    not taken for model.py.
    """
    if arg.endswith(".py"):
        return arg
    if os.path.isfile(arg + ".py") and (os.sep in arg or not takes_positionals):
        return arg + ".py"
    return None


def configure(namespace, argv, takes_positionals=True):
    """Set the options in a module's globals from its command line.

    Args:
        namespace: the globals of the script; its options are overwritten in place.
        argv: the arguments after the script's name.
        takes_positionals: whether the script has positional arguments at all.

    Returns:
        The positional arguments, a list of strings.

    Raises:
        UsageError: unknown option, wrong type, missing or failing config file.
    """
    types = option_types(namespace)
    defaults = {name: namespace[name] for name in types}
    positionals = []
    for arg in argv:
        if arg.startswith("--"):
            name, equals, text = arg[2:].partition("=")
            if name not in types:
                raise unknown_option(name, types)
            if not equals and types[name] is not bool:
                raise UsageError(f"--{name} needs a value: --{name}=...")
            namespace[name] = parse_value(name, text, types[name]) if equals else True
        elif config := as_config_file(arg, takes_positionals):
            namespace.update(read_config_file(config, namespace, types))
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

    Errors that a person can act on become one line on stderr: exit status 2 for wrong arguments and missing files,
    1 for anything else. They are UsageError, OSError, and any exception that says `exit_status` (the errors of
    model.py, data.py and checkpoint.py); everything else is a bug and keeps its traceback.
    """
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print_help(main)
        sys.exit(0)
    parameters = inspect.signature(main).parameters
    try:
        positionals = configure(main.__globals__, argv, takes_positionals=bool(parameters))
        required = sum(p.default is inspect.Parameter.empty for p in parameters.values())
        if not required <= len(positionals) <= len(parameters):
            extra = positionals[len(parameters):]
            problem = f"unexpected argument {extra[0]!r}" if extra else "missing argument"
            if extra and not parameters:
                problem = f"no config file {extra[0]}"
            raise UsageError(f"{problem}; usage: {usage(main)}")
        main(*positionals)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except BrokenPipeError:  # the reader of our output has gone (`... | head`): nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        missing = isinstance(error, (UsageError, FileNotFoundError, NotADirectoryError, IsADirectoryError))
        status = getattr(error, "exit_status", 2 if missing else 1)
        if not (missing or isinstance(error, OSError) or hasattr(error, "exit_status")):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(status)
