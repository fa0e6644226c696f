"""Data sets of tokens: data/<name>/{train,val}.bin and meta.json, and the batch of a step.

A .bin file is a plain array of uint16 tokens, as nanoGPT writes it. A directory without meta.json (one that nanoGPT's
own script made) holds GPT-2 tokens. Tokenizers are in tokenizer.py.
"""
import json
import os
import re
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from kronygpt.configurator import UserError
from kronygpt.device import pick_device
from kronygpt.files import atomic_write, lock, remove_leftovers
from kronygpt.tokenizer import (
    GPT2_VOCAB_SIZE,
    TOKEN_TYPE,
    BytesTokenizer,
    GPT2Tokenizer,
    UnknownTokenizer,
    is_same,
    tokenizer_name,
)
from model import linear_cross_entropy

DATA_DIR = Path("data")
SPLITS = ("train", "val")
MAGICS = {  # how files of other programs begin
    b"\x93NUMPY": "a .npy of numpy: array.astype('uint16').tofile(path) writes plain tokens",
    (20240520).to_bytes(4, "little"): "a .bin of llm.c with a header of 256 int32: its uint16 tokens begin at byte 1024",
    (20240801).to_bytes(4, "little"): "a .bin of llm.c with a header of 256 int32 and uint32 tokens",
    b"PK\x03\x04": "a zip archive (.npz, torch.save)",
    b"\x1f\x8b\x08": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\x89HDF": "an HDF5 file",
    b"ARROW1": "an Arrow file",
    b"PAR1": "a parquet file",
}
FORMAT_BYTES = 2**16  # of the beginning of a .bin, whose format is looked at
SMALLEST_FORMAT = 64  # bytes that tell a format
CHECKED_TOKENS = 1024  # looked at, spread evenly over a split, before anything is done with it
ROWS = (".jsonl", ".json", ".parquet")
CHARACTERS_AT_ONCE = 2**20  # of a text that is split


class DatasetWriter:
    """Writes data/<name>/ as a context manager: the files appear under their names when all of them are complete, and then
    `report` says what they hold.

    with DatasetWriter("mytext", tokenizer, source="where it came from") as writer:
        writer.add("train", tokens_of_a_document)
    """

    def __init__(self, name, tokenizer, source):
        self.directory = DATA_DIR / name
        self.tokenizer = tokenizer
        self.source = source

    def __enter__(self):
        if self.tokenizer.end_of_text is None:
            raise UserError(f"the tokenizer {self.tokenizer.name} has no end-of-text token: name one as eos_token in its "
                            "tokenizer_config.json")
        self.lock = lock(self.directory)
        self.writes = ExitStack()
        paths = {split: self.directory / f"{split}.bin" for split in SPLITS}
        names = [re.escape(path.name) for path in (*paths.values(), self.directory / "meta.json")]
        remove_leftovers(self.directory, "|".join(names), is_locked=True)
        self.files = {split: self.writes.enter_context(atomic_write(path)) for split, path in paths.items()}
        self.documents = dict.fromkeys(SPLITS, 0)
        self.end_of_text = np.array([self.tokenizer.end_of_text], dtype=TOKEN_TYPE)
        return self

    def add(self, split, tokens):
        """Append a document's tokens (uint16) and an end-of-text token."""
        self.files[split].write(tokens.data)
        self.files[split].write(self.end_of_text.data)
        self.documents[split] += 1

    def __exit__(self, error_type, error, traceback):
        try:
            if error is None:
                self.finish()
            else:
                if isinstance(error, OSError):  # a write that fails does not say to which file
                    error.filename = error.filename or str(self.directory)
                self.writes.__exit__(error_type, error, traceback)
        finally:
            self.directory.joinpath(".lock").unlink()
            if not any(self.directory.iterdir()):
                self.directory.rmdir()
            self.lock.release()

    def finish(self):
        """Give the files their names; a reader in between finds counts in meta.json that are not those of the files."""
        tokens = {split: file.tell() // self.end_of_text.itemsize for split, file in self.files.items()}
        with self.writes:
            for file in self.files.values():  # whatever fails, fails before the first one has its name
                file.flush()
                os.fsync(file.fileno())
        meta = dict(vocab_size=self.tokenizer.vocab_size, tokenizer=self.tokenizer.name, tokens=tokens,
                    documents=self.documents, source=self.source)
        if self.tokenizer.directory:
            meta["tokenizer_path"] = str(self.tokenizer.directory)
        with atomic_write(self.directory / "meta.json", "w") as file:
            file.write(json.dumps(meta, indent=2) + "\n")
        self.report = "\n".join(f"{self.directory / split}.bin: {tokens[split]:,} tokens of {self.documents[split]:,} "
                                "documents" for split in SPLITS)


def find_dataset(name):
    """The directory of a data set.

    Raises:
        FileNotFoundError: there is none; the message names the command that makes it.
    """
    directory = DATA_DIR / name
    if not any((directory / f"{split}.bin").exists() for split in SPLITS):
        known = {"openwebtext": "python prepare_owt.py", "pydocs": "python -m experiments.prepare_pydocs"}
        command = known.get(name, f"python prepare_owt.py --data_files='*.txt' --out={name}")
        others = sorted(path.parent.name for path in DATA_DIR.glob("*/train.bin"))
        there = f" (there are: {', '.join(others)})" if others else ""
        raise FileNotFoundError(f"no data set in {directory}; make it with: {command}{there}")
    return directory


def load_meta(name):
    """The meta.json of a data set, with GPT-2's tokenizer and vocabulary where there is none.

    Raises:
        FileNotFoundError: no such data set.
        UserError: a meta.json that says nothing of use, or none where nanoGPT's meta.pkl shows other tokens.
    """
    path = find_dataset(name) / "meta.json"
    if not path.exists() and path.with_name("meta.pkl").exists():  # a pickle, which could run code: not opened
        meta = json.dumps(dict(vocab_size=largest_token(path.parent) + 1, tokenizer=UnknownTokenizer.name))
        raise UserError(f"{path.parent} has a meta.pkl, so its tokens are not GPT-2's, and no meta.json: "
                        f"write {meta} into {path}")
    if not path.exists():
        return dict(vocab_size=GPT2_VOCAB_SIZE, tokenizer=GPT2Tokenizer.name, tokens={})
    try:
        if not path.is_file():
            raise ValueError("no regular file")
        meta = dict(tokens={}) | json.loads(path.read_bytes())
        texts = meta["tokenizer"], meta.get("tokenizer_path", "")
        if not (isinstance(meta["vocab_size"], int) and all(isinstance(text, str) for text in texts)
                and isinstance(meta["tokens"], dict) and all(isinstance(n, int) for n in meta["tokens"].values())):
            raise TypeError("vocab_size and the numbers of tokens are whole numbers and tokenizer a string")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); prepare the data set again") from None
    return meta


def largest_token(directory):
    """The largest token of a data set, from all of it."""
    paths = [path for split in SPLITS if (path := directory / f"{split}.bin").exists()]
    for path in paths:
        check_format(path)
    return max((int(np.memmap(path, TOKEN_TYPE, "r").max()) for path in paths if path.stat().st_size), default=0)


def data_tokenizer(name):
    """The record of a data set's tokenizer, for a model that is trained on it from scratch, or None where the size of
    the vocabulary tells it."""
    meta = load_meta(name)
    if meta["tokenizer"] in (GPT2Tokenizer.name, BytesTokenizer.name):
        return None
    return dict(name=meta["tokenizer"], path=meta.get("tokenizer_path"))


def check_format(path):
    """Raise UserError where a .bin shows another format than plain uint16 tokens."""
    if not path.is_file():
        raise UserError(f"{path} is no file of plain uint16 tokens: it is no regular file")
    with open(path, "rb") as file:
        head = file.read(FORMAT_BYTES)
    n_bytes = path.stat().st_size
    seen = next((kind for magic, kind in MAGICS.items() if head.startswith(magic)), None) or seen_width(head)
    if seen:
        raise UserError(f"{path} is no file of plain uint16 tokens: it looks like {seen}")
    if n_bytes % np.dtype(TOKEN_TYPE).itemsize:
        raise UserError(f"{path} has {n_bytes} bytes, an odd number, so it is no file of uint16 tokens; prepare it again")


def seen_width(head):
    """What the beginning of a .bin shows of another width than 16 bits, or None."""
    if len(head) < SMALLEST_FORMAT:
        return None
    if is_text(head):
        return "text, or tokens of 8 bits (uint8)"
    for width in 8, 4:
        parts = np.frombuffer(head[:len(head) // width * width], "<u2").reshape(-1, width // 2)
        low, second, rest = parts[:, 0], parts[:, 1], parts[:, 2:]
        # a wide token has zeros in its upper half, or in vocabularies of over 65,536 tokens a small number
        if not rest.any() and second.max() <= 3 and low.max() > 3:
            return f"tokens of {8 * width} bits (uint{8 * width} or int{8 * width}): array.astype('uint16').tofile(path) " \
                   "writes plain ones"
    return None


def is_text(head):
    """Whether bytes are UTF-8 with no control characters, which uint16 tokens are not."""
    try:
        text = head[:-4].decode()  # a character may be cut at the end
    except UnicodeDecodeError as error:
        if error.end < len(head) - 8:
            return False
        text = head[:error.start].decode()
    return all(character >= " " or character in "\t\n\r" for character in text)


def load_tokens(name, split, config, block_size=1):
    """The tokens of a split, memory-mapped.

    Args:
        name: of the data set, a directory under data/.
        split: "train" or "val".
        config: the KronyGPTConfig of the model that is to read them.
        block_size: the context that must fit into the split, with the target of its last token.

    Raises:
        FileNotFoundError: no such data set or split.
        UserError: the file is damaged or too short, or the tokens are not of this vocabulary.
    """
    path = find_dataset(name) / f"{split}.bin"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: prepare the data set again")
    meta = load_meta(name)
    check_tokenizer(path, meta, config)
    vocab_size = config.vocab_size
    check_format(path)
    n_bytes = path.stat().st_size
    n_tokens = n_bytes // np.dtype(TOKEN_TYPE).itemsize
    if n_tokens != meta["tokens"].get(split, n_tokens):
        raise UserError(f"{path} has {n_tokens:,} tokens, and meta.json counts {meta['tokens'][split]:,}: "
                        "prepare the data set again")
    if n_tokens <= block_size:
        raise UserError(f"{path} has {n_tokens} tokens, and a block takes {block_size + 1}: "
                        "use a smaller block_size or more text")
    tokens = np.memmap(path, dtype=TOKEN_TYPE, mode="r")
    sample = np.linspace(0, n_tokens - 1, CHECKED_TOKENS).astype(np.int64)  # the others are checked when they are used
    bad = sample[tokens[sample] >= vocab_size]
    if len(bad):
        raise unknown_token(tokens[bad[0]], tokens, bad[0], vocab_size)
    return tokens


def check_tokenizer(path, meta, config):
    """Raise UserError unless a data set and a model have the same tokenizer."""
    ours, vocab_size, tokenizer = tokenizer_name(config), config.vocab_size, config.tokenizer
    fits = meta["vocab_size"] <= vocab_size
    if ours == UnknownTokenizer.name:
        fits = (tokenizer is not None and fits) or meta["vocab_size"] == vocab_size  # the size is all that is known
    elif tokenizer is not None:
        fits = True  # tokens that were added to it may be none of the model's
    if not (fits and is_same(meta["tokenizer"], ours)):
        raise UserError(f"{path} holds {meta['tokenizer']} tokens with a vocabulary of {meta['vocab_size']}, and the model "
                        f"has a vocabulary of {vocab_size}, of {ours} tokens: use data and a model that belong together")


def unknown_token(token, tokens, position, vocab_size):
    where = f"{getattr(tokens, 'filename', 'the data')}, position {position}"
    return UserError(f"token {token} in {where}: the model's vocabulary ends at {vocab_size - 1}")


def check_tokens(tokens, vocab_size, begin=0, end=None):
    """Raise UserError where one of tokens[begin:end] is none of the vocabulary."""
    part = tokens[begin:end]
    if len(part) and part.max() >= vocab_size:
        raise unknown_token(part.max(), tokens, begin + part.argmax(), vocab_size)


def windows(tokens, starts, block_size, vocab_size, device="cpu"):
    """Inputs and targets (len(starts), block_size), int64 tensors, of the windows that begin at starts.

    A GPU is not waited for: it may still be at work on the last batch while this one is read and sent.

    Raises:
        UserError: a token that the vocabulary does not have.
    """
    rows = np.stack([tokens[start:start + block_size + 1] for start in starts])
    if rows.max() >= vocab_size:
        row, column = np.argwhere(rows >= vocab_size)[0]
        raise unknown_token(rows[row, column], tokens, starts[row] + column, vocab_size)
    rows = torch.from_numpy(rows.astype(np.int64))
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
        dataset: its name under data/.
        n_tokens: number of tokens; all there are, where they are fewer.
        config: the KronyGPTConfig of the model that reads them.
        device: its name, or "" for the default.

    Returns:
        (windows, block_size) tokens.

    Raises:
        UserError: fewer tokens than a window has, or than a matrix has inputs.
    """
    context, hidden = config.block_size, config.n_inner
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

    The mode of the model, training or eval, and autocast are the caller's.

    Args:
        model: a KronyGPT, on its device.
        tokens: array of the whole text.
        windows: [(begin, first, end)]: the model reads tokens[begin:end], and the losses of tokens[first:end] count, where
            first > begin.
        batch_size: windows in a batch.

    Raises:
        UserError: a token that the vocabulary does not have.
    """
    device = model.lm_head.weight.device
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
        total += linear_cross_entropy(x, model.lm_head.weight, idx[:, 1:][counts]).item() * len(x)
        n_scored += len(x)
        yield total, n_scored


def mean_loss(model, tokens, windows, batch_size):
    """The mean loss in nats of the tokens that score() counts."""
    *_, (total, n_scored) = score(model, tokens, windows, batch_size)
    return total / n_scored


# ----------------------------------------------------------------------------------------------------------------------
# Texts in files: a column of rows in .jsonl, .json and .parquet; a file with another ending is one UTF-8 text

def read_rows(path, column="text"):
    """Yield the texts of a file, None for a row whose text is null; a byte order mark and empty lines are no text.

    Args:
        path: of the file.
        column: name of the column, or field, with the texts.

    Raises:
        FileNotFoundError: there is no file.
        UserError: it is damaged, or has no such column of strings.
    """
    path = Path(path)
    check_is_text(path)
    kind = path.suffix.lower()
    if kind == ".parquet":
        yield from parquet_rows(path, column)
    elif kind in ROWS:
        yield from json_rows(path, column) if kind == ".json" else jsonl_rows(path, column)
    else:
        yield "".join(read_pieces(path, newline=""))


def check_is_text(path):
    """Raise an error where there is no file, or one that would be waited for, such as a pipe."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no file {path}")
    if not Path(path).is_file():
        raise UserError(f"{path} is no regular file")


def read_pieces(path, separator=None, newline=None):
    """Yield the pieces of a UTF-8 text between separators, or of any size without one.

    Args:
        path: of the file.
        separator: between pieces.
        newline: as of open(): None reads every line end as "\\n", "" leaves all as they are.
    """
    check_is_text(path)
    rest = ""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            while chunk := file.read(CHARACTERS_AT_ONCE):
                *pieces, rest = (rest + chunk).split(separator) if separator else (chunk, "")
                yield from pieces
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    yield rest


def jsonl_rows(path, column):
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield text_of(line, column, f"{path}, line {number}")


def json_rows(path, column):
    """The rows of a list of objects or of strings, of one object, or of JSON lines."""
    try:
        rows = json.loads(path.read_bytes())  # which finds a byte order mark
    except (ValueError, RecursionError):
        return jsonl_rows(path, column)
    rows = rows if isinstance(rows, list) else [rows]
    return (row if isinstance(row, str) else text_of(row, column, f"{path}, row {i}") for i, row in enumerate(rows, 1))


def text_of(row, column, where):
    """The text of an object, or of a line of JSON."""
    try:
        row = json.loads(row.decode()) if isinstance(row, bytes) else row
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        fields = f", but {', '.join(row)}" if isinstance(row, dict) and column not in row else ""
        raise UserError(f"{where} is not UTF-8 JSON with a string `{column}`{fields}") from None
    return text


def parquet_rows(path, column):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise UserError(f"{path} has the columns {', '.join(schema.names)}, and no `{column}`")
            check_strings(schema.field(column).type, column, path)
            for batch in file.iter_batches(columns=[column]):
                yield from batch.column(column).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from None


def check_strings(kind, column, where):
    """Raise UserError unless an Arrow type is one of strings, or of nulls alone."""
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    if not any(is_kind(value) for is_kind in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)):
        raise UserError(f"the `{column}` in {where} is {kind}, and strings are needed")
