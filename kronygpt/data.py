"""Data sets of tokens, the batch of a step, the loss of a model on tokens, and texts in files.

A data set is data/<name>/{train,val}.bin and meta.json. A .bin file is a plain array of uint16 tokens, as nanoGPT writes
it. A directory without meta.json (one that nanoGPT's own script made) holds GPT-2 tokens. Tokenizers are in tokenizer.py.
"""
import json
import os
import shutil
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem

from kronygpt.configurator import UserError
from kronygpt.device import pick_device
from kronygpt.files import atomic_write, lock
from kronygpt.tokenizer import KNOWN, TOKEN_TYPE, GPT2Tokenizer, check_no_pointer, fits, read_json, tokenizer_name
from model import linear_cross_entropy

DATA_DIR = Path("data")
SPLITS = ("train", "val")
CHECKED_TOKENS = 2**20  # of a split, before anything is done with it; the others are checked when they are used
LLM_C = (20240520, 20240801)  # how a .bin of llm.c begins: a header of 256 int32
TABLES = (".csv", ".tsv", ".parquet", ".arrow")
ROWS = (".jsonl", ".ndjson", ".jsonlines", ".json", *TABLES)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
CHARACTERS_AT_ONCE = 2**20  # of a text that is split
LARGEST_ROW = 2**26  # bytes of a row of a .csv; a larger one is an error


def find_dataset(name):
    """The directory of a data set.

    Raises:
        FileNotFoundError: there is none; the message names the command that makes it.
    """
    directory = DATA_DIR / name
    if not any((directory / f"{split}.bin").exists() for split in SPLITS):
        known = {"openwebtext": "python prepare_owt.py", "pydocs": "python -m experiments.prepare_pydocs",
             "pysource": "python -m experiments.prepare_pysource"}
        command = known.get(name, f"python prepare_owt.py --data_files='*.txt' --out={name}")
        raise FileNotFoundError(f"no data set in {directory}; make it with: {command}")
    return directory


def load_meta(name):
    """The meta.json of a data set, with GPT-2's tokenizer and vocabulary where there is none.

    Raises:
        FileNotFoundError: no such data set.
        UserError: nanoGPT's meta.pkl shows tokens other than GPT-2's, and there is no meta.json.
    """
    path = find_dataset(name) / "meta.json"
    if not path.exists() and path.with_name("meta.pkl").exists():  # a pickle, which could run code: not opened
        raise UserError(f"{path.parent} has a meta.pkl, so its tokens are not GPT-2's, and no meta.json: write "
                        f'{{"vocab_size": N, "tokenizer": "unknown"}} into {path}, with the N that prepare.py printed')
    return dict(tokens={}) | read_json(path, dict(vocab_size=GPT2Tokenizer.vocab_size, tokenizer=GPT2Tokenizer.name))


def data_tokenizer(name):
    """The record of a data set's tokenizer, for a model that is trained on it from scratch, or None where the size of
    the vocabulary tells it."""
    meta = load_meta(name)
    return None if meta["tokenizer"] in KNOWN else dict(name=meta["tokenizer"], path=meta.get("tokenizer_path"))


def load_tokens(name, split, config, block_size=1):
    """The tokens of a split, memory-mapped.

    Args:
        name, split: data/<name>/<split>.bin.
        config: the KronyGPTConfig of the model that is to read them.
        block_size: the context that must fit into the split, with the target of its last token.

    Raises:
        FileNotFoundError: no such data set or split.
        UserError: the file is of another format or too short, or the tokens are not of this vocabulary.
    """
    path, meta = find_dataset(name) / f"{split}.bin", load_meta(name)
    if not fits(config, meta["tokenizer"], meta["vocab_size"]):
        raise UserError(f"{path} holds {meta['tokenizer']} tokens with a vocabulary of {meta['vocab_size']}, and the model "
                        f"has a vocabulary of {config.vocab_size}, of {tokenizer_name(config)} tokens: use data and a model "
                        "that belong together")
    head = np.fromfile(path, "<u4", count=2**14)
    # a wide token has zeros in its upper half, or in vocabularies of over 65,536 tokens a small number
    is_wide = len(head) >= 16 and (head >> 16).max() <= 3 and (head & 0xffff).max() > 3
    if is_wide or (len(head) and head[0] in LLM_C):
        raise UserError(f"{path} looks like tokens of 32 or 64 bits, or like llm.c's, which follow a header of 1024 bytes: "
                        "array.astype('uint16').tofile(path) writes plain ones")
    n_tokens = path.stat().st_size // np.dtype(TOKEN_TYPE).itemsize
    if n_tokens != meta["tokens"].get(split, n_tokens):
        raise UserError(f"{path} has {n_tokens:,} tokens, and meta.json counts {meta['tokens'][split]:,}: "
                        "prepare the data set again")
    if n_tokens <= block_size:
        raise UserError(f"{path} has {n_tokens} tokens, and a block takes {block_size + 1}: "
                        "use a smaller block_size or more text")
    tokens = np.memmap(path, dtype=TOKEN_TYPE, mode="r")
    check_tokens(tokens, config.vocab_size, end=CHECKED_TOKENS)
    return tokens


def check_tokens(tokens, vocab_size, begin=0, end=None):
    """Raise UserError where one of tokens[begin:end] is none of the vocabulary."""
    part = tokens[begin:end]
    if len(part) and part.max() >= vocab_size:
        where = f"{getattr(tokens, 'filename', 'the data')}, position {begin + part.argmax()}"
        raise UserError(f"token {part.max()} in {where}: the model's vocabulary ends at {vocab_size - 1}")


def windows(tokens, starts, block_size, vocab_size, device="cpu"):
    """Inputs and targets (len(starts), block_size), int64 tensors, of the windows that begin at starts.

    A GPU is not waited for: it may still be at work on the last batch while this one is read and sent.

    Raises:
        UserError: a token that the vocabulary does not have.
    """
    for start in starts:
        check_tokens(tokens, vocab_size, start, start + block_size + 1)
    rows = torch.from_numpy(np.stack([tokens[start:start + block_size + 1] for start in starts]).astype(np.int64))
    if torch.device(device).type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1].to(device), rows[:, 1:].to(device)


def batch_starts(n_tokens, block_size, seed, step, global_batch_size):
    """Where the windows of a step's global batch begin: a function of the seed and the step alone, so that a resumed
    run sees the batches it would have seen, and processes that take slices of it see between them what one would."""
    return np.random.default_rng((seed, step)).integers(n_tokens - block_size, size=global_batch_size)


def step_seed(seed, step, rank):
    """The seed of what is random in a step besides its batch, for one process."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def even_starts(n_tokens, block_size, n_windows):
    """Where n_windows windows begin that are spread evenly over a split: the same for every evaluation."""
    return np.linspace(0, n_tokens - block_size - 1, n_windows).astype(np.int64)


def calibration_text(dataset, n_tokens, config, device):
    """Windows spread evenly over the training split of a data set.

    Args:
        n_tokens: number of tokens; all there are, where they are fewer.
        config: the KronyGPTConfig of the model that reads them.

    Returns:
        (windows, block_size) tokens on the device.

    Raises:
        UserError: fewer tokens than a window has, or than a matrix has inputs.
    """
    context, hidden = config.block_size, max(config.n_inner)
    tokens = load_tokens(dataset, "train", config, context)
    n_tokens = min(n_tokens, len(tokens))
    if n_tokens < max(context, hidden):
        raise UserError(f"{n_tokens} calibration tokens are too few: a window has {context}, and a matrix up to {hidden} "
                        "inputs, which fewer tokens cannot tell apart")
    starts = even_starts(len(tokens), context, n_tokens // context)
    return windows(tokens, starts, context, config.vocab_size, pick_device(device))[0]


# ----------------------------------------------------------------------------------------------------------------------
# The loss of a model on tokens

@torch.no_grad()
def score(model, tokens, windows, batch_size):
    """Score tokens window by window; yields (sum of the losses in nats, tokens scored) so far, after each batch.

    Args:
        model: a KronyGPT, on its device; its mode, training or eval, and autocast are the caller's.
        tokens: array of the whole text.
        windows: [(begin, first, end)]: the model reads tokens[begin:end], and the losses of tokens[first:end] count, where
            first > begin.
        batch_size: windows in a batch.

    Raises:
        UserError: a token that the vocabulary does not have.
    """
    device = next(model.parameters()).device
    total, n_scored = 0.0, 0
    for i in range(0, len(windows), batch_size):
        batch = windows[i:i + batch_size]
        length = max(end - begin for begin, _, end in batch)
        idx = torch.zeros(len(batch), length, dtype=torch.long)  # shorter windows are padded behind their end
        counts = torch.zeros(len(batch), length, dtype=torch.bool)
        for row, (begin, first, end) in enumerate(batch):
            check_tokens(tokens, model.config.vocab_size, begin, end)
            idx[row, :end - begin] = torch.from_numpy(tokens[begin:end].astype(np.int64))
            counts[row, first - begin:end - begin] = True
        idx, counts = idx.to(device), counts[:, 1:].to(device)
        x = model.hidden(idx[:, :-1])[counts]  # (tokens scored, C)
        loss = linear_cross_entropy(*model.transformer.wte.as_output(x, idx[:, 1:][counts]))
        total += loss.item() * len(x)
        n_scored += len(x)
        yield total, n_scored


def sliding_windows(n_tokens, context, stride):
    """The windows of score() that score each token once, one every stride tokens. The first token of a window has no context
    and is not scored in that window."""
    windows = [(begin, begin + max(1, context - stride if begin else 1), min(begin + context, n_tokens))
               for begin in range(0, max(1, n_tokens - context + stride), stride)]
    return [(begin, first, end) for begin, first, end in windows if first < end]


def mean_loss(model, tokens, windows, batch_size):
    """The mean loss in nats of the tokens that score() counts."""
    *_, (total, n_scored) = score(model, tokens, windows, batch_size)
    return total / n_scored


# ----------------------------------------------------------------------------------------------------------------------
# Writing a data set

def write_documents(directory, tokenizer, source, documents):
    """Write a data set: its files appear under their names when all of them are complete.

    Args:
        tokenizer: the Tokenizer that the tokens are of; its end_of_text is written behind each document.
        source: where the text is from, for meta.json.
        documents: {split: iterable of the tokens of a document as uint16}.

    Returns:
        A line for each split, of what was written.
    """
    n_tokens, n_documents = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    end_of_text = np.array([tokenizer.end_of_text], dtype=TOKEN_TYPE)
    with ExitStack() as writes:  # the file that is opened last has its name first
        files = {split: writes.enter_context(atomic_write(directory / f"{split}.bin")) for split in SPLITS}
        meta_file = writes.enter_context(atomic_write(directory / "meta.json", "w"))
        for split, part in documents.items():
            for tokens in part:
                files[split].write(tokens.data)
                files[split].write(end_of_text.data)
                n_documents[split] += 1
                n_tokens[split] += len(tokens) + 1
        meta = dict(vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.name, tokens=n_tokens, documents=n_documents,
                    source=source)
        if tokenizer.directory:
            meta["tokenizer_path"] = str(tokenizer.directory)
        meta_file.write(json.dumps(meta, indent=2) + "\n")
        for file in (*files.values(), meta_file):  # whatever fails, fails before the first one has its name
            file.flush()
            os.fsync(file.fileno())
    return "\n".join(f"{directory / split}.bin: {n_tokens[split]:,} tokens of {n_documents[split]:,} documents"
                     for split in SPLITS)


@contextmanager
def scratch_folder(directory):
    """Lock a data set that is going to be written, with a folder in its directory for what is large. The folder goes at the
    end, and the directory where nothing was written."""
    folder = directory / ".scratch"
    held = lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # only empty ones can be removed
            os.removedirs(directory)
        held.release()


# ----------------------------------------------------------------------------------------------------------------------
# Texts in files: a column of rows in JSON lines, a list in a .json, .csv, .tsv, .parquet or .arrow; a file with another
# ending is one UTF-8 text. Texts may be compressed, as in .jsonl.gz

def kind_of(path):
    """The ending of a file in lower case, without that of its compression: ".jsonl" of a.jsonl.gz."""
    path = Path(path)
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path).suffix.lower()


@contextmanager
def reading(place):
    """Errors in this block name the file, or a line of it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # those of gzip, pyarrow and UTF-8 have no class in common
        raise UserError(f"cannot read {place}: {type(error).__name__}: {error}") from None


def open_unpacked(path, mode="r", newline=None):
    """Open a file, which may be compressed: as UTF-8 without its byte order mark, or as bytes; newline is that of open()."""
    check_no_pointer(path)
    text = {} if "b" in mode else dict(encoding="utf-8-sig", newline=newline)
    compression = "infer" if Path(path).suffix.lower() in COMPRESSED else None
    return LocalFileSystem().open(str(path), mode, compression=compression, **text)


def read_pieces(path, separator=None):
    """Yield the pieces of a UTF-8 text between separators, or the whole text without one; any line end is read as "\\n"."""
    rest = ""
    with reading(path), open_unpacked(path) as file:
        while separator and (chunk := file.read(CHARACTERS_AT_ONCE)):
            *pieces, rest = (rest + chunk).split(separator)
            yield from pieces
        yield rest + file.read()


def read_rows(path, column="text"):
    """Yield the texts of a file; a row whose text is null has none.

    Args:
        path: of the file; one that is neither a table nor JSON is one text.
        column: name of the column, or field, with the texts.

    Raises:
        UserError: it cannot be read, or has no such column of strings.
    """
    kind = kind_of(path)
    with reading(path):
        if kind in TABLES:
            yield from texts_of(table_rows(path, kind, column), column, path)
        elif kind in ROWS:
            yield from texts_of(json_rows(path), column, path)
        else:
            with open_unpacked(path, newline="") as file:
                yield file.read()


def texts_of(rows, column, source):
    """Yield the strings in a column of rows, without nulls; UserError where a row has no such column of strings."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get(column, 0), str | None):
            names = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
            raise UserError(f"{source}, row {number} has no text in a column `{column}` (columns: {names})")
        if row[column] is not None:
            yield row[column]


def json_rows(path):
    """Yield the rows of JSON lines, or of a list, which may take many lines."""
    with open_unpacked(path) as file:
        for number, line in enumerate(file, 1):
            with reading(f"{path}, line {number}"):
                if line.startswith("["):
                    yield from json.loads(line + file.read())
                elif line.strip():
                    yield json.loads(line)


def table_rows(path, kind, column):
    """Yield the rows of a table, of the column alone. The format of an .arrow is that of `datasets`, for streams."""
    import pyarrow as pa
    from pyarrow import csv
    from pyarrow.parquet import ParquetFile

    with open_unpacked(path, "rb") as file:
        if kind == ".parquet":
            batches = ParquetFile(file).iter_batches(columns=[column])
        elif kind == ".arrow":
            batches = pa.ipc.open_stream(file)
        else:
            batches = csv.open_csv(file, csv.ReadOptions(block_size=LARGEST_ROW),
                                   csv.ParseOptions(delimiter="," if kind == ".csv" else "\t", newlines_in_values=True),
                                   csv.ConvertOptions(include_columns=[column], column_types={column: pa.string()}))
        for batch in batches:
            yield from batch.select([column]).to_pylist()
