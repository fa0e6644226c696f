"""Make data/pysource from the Python source in this environment: 74 MB of text with a real vocabulary, and no download.

    python -m experiments.prepare_pysource      # → data/pysource: train.bin, val.bin, meta.json, tokenizer/

The documents are the source files of the standard library and of the packages that requirements.txt pins, so the same pins
and the same Python give the same text. Copies of other packages, tests, generated tables and near-duplicates are left out.
The tokens are a byte-level BPE that is trained on the training split. One file in fifty is held out.
"""
import hashlib
import random
import re
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from kronygpt.configurator import run

out = "pysource"  # name of the data set, a directory under data/
vocab_size = 8192  # tokens of the BPE
val_fraction = 0.02  # share of the files in the validation split
seed = 1337  # seed for the shuffle
max_files: int | None = None  # number of files that are taken; default: all

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "testing", "_vendor", "vendor", "vendored", "third_party",
           "externals", "idlelib", "lib2to3", "pydoc_data", "ensurepip", "turtledemo", "tkinter", "encodings"}
SIZES = 500, 200_000  # bytes of a file: shorter ones say little, longer ones are tables
LONGEST_LINE = 500  # characters; longer ones are generated
COPIED = 0.5  # share of a file's long lines that other files have: the file is a near-duplicate from there on
LONG_LINE = 25  # characters of a line that two files do not share by chance


def source_files():
    """[(name, path)] of the Python files of the standard library and of the pinned packages, in the order of their names."""
    library = Path(sysconfig.get_path("stdlib"))
    found = {f"python/{path.relative_to(library)}": path for path in library.rglob("*.py")}
    pins = Path(__file__).parent.parent.joinpath("requirements.txt").read_text(encoding="utf-8")
    for package in re.findall(r"^([\w-]+)==", pins, re.MULTILINE):
        found |= {f"{package}/{file}": Path(file.locate()) for file in metadata.files(package) or []
                  if file.suffix == ".py" and ".." not in file.parts}
    return [(name, path) for name, path in sorted(found.items())
            if not SKIPPED & set(Path(name).parts) and SIZES[0] <= path.stat().st_size <= SIZES[1]]


def documents():
    """The texts of source_files(), each once."""
    seen, texts = set(), []
    for _, path in source_files():
        text = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n").strip()
        lines = text.splitlines()
        if max(map(len, lines), default=0) > LONGEST_LINE:
            continue
        long_lines = {hashlib.md5(line.strip().encode()).digest() for line in lines if len(line.strip()) >= LONG_LINE}
        if len(long_lines & seen) <= COPIED * len(long_lines):
            texts.append(text)
        seen |= long_lines
    return texts


def train_tokenizer(texts, directory):
    """Train a byte-level BPE and write it as Hugging Face does; returns it as a Tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    from kronygpt.tokenizer import END_OF_TEXT, HuggingFaceTokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size, min_frequency=0, special_tokens=[END_OF_TEXT], show_progress=False)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return HuggingFaceTokenizer(directory)


def main():
    from kronygpt.data import DATA_DIR, write_documents

    texts = documents()
    random.Random(seed).shuffle(texts)
    texts = texts[:max_files]
    n_val = max(1, round(len(texts) * val_fraction))
    print(f"{len(texts):,} files, {sum(map(len, texts)) / 1e6:.1f}M characters")
    tokenizer = train_tokenizer(texts[n_val:], DATA_DIR / out / "tokenizer")
    source = f"source of CPython {sys.version.split()[0]} and of the packages in requirements.txt"
    splits = dict(val=map(tokenizer.encode, texts[:n_val]), train=map(tokenizer.encode, texts[n_val:]))
    print(write_documents(DATA_DIR / out, tokenizer, source, splits))


if __name__ == "__main__":
    run(main)
