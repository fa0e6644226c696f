"""Make data/pydocs from the documentation inside this Python: real English text, with no download.

    python -m experiments.prepare_pydocs

The documents are the topics of the language reference (`pydoc_data.topics`) and, one document per source file, the
docstrings of the standard library, as UTF-8 bytes (a vocabulary of 256). They are shuffled by document, and one in
twenty is held out. What is there depends a little on the version of Python.
"""
import ast
import random
import sys
import sysconfig
from pathlib import Path

from kronygpt.configurator import run

out = "pydocs"  # name of the data set, a directory under data/
val_fraction = 0.05  # share of the documents in the validation split
seed = 1337  # seed for the shuffle

# Not the standard library, not installed everywhere, or not about it.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "ensurepip",
           "turtledemo", "tkinter", "distutils", "encodings"}


def docstrings(path):
    """The docstrings of a Python file, in their order, as one text; empty if there are none."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # templates and tests of the parser
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))


def documents():
    """All documents, in an order that depends on this Python's version only."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in library.rglob("*.py") if not SKIPPED & set(path.relative_to(library).parts))
    texts = [topics[name] for name in sorted(topics)] + [docstrings(path) for path in files]
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))  # each once


def main():
    from kronygpt.data import DATA_DIR, write_documents
    from kronygpt.tokenizer import BytesTokenizer

    texts = documents()
    random.Random(seed).shuffle(texts)
    n_val = max(1, round(len(texts) * val_fraction))
    tokenizer = BytesTokenizer()
    source = f"documentation of CPython {sys.version.split()[0]}: pydoc topics and docstrings"
    splits = dict(val=map(tokenizer.encode, texts[:n_val]), train=map(tokenizer.encode, texts[n_val:]))
    print(write_documents(DATA_DIR / out, tokenizer, source, splits))


if __name__ == "__main__":
    run(main)
