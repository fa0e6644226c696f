"""Data sets of tokens: data/<name>/{train,val}.bin and meta.json, their tokenizers, and the batch of a step.

A .bin file is a plain array of uint16 tokens, as nanoGPT writes it. A directory without meta.json (one that nanoGPT's
own script made) holds GPT-2 tokens.
"""
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import tiktoken
import torch

from configurator import UserError
from files import ASIDE, atomic_write, lock, remove_leftovers

DATA_DIR = Path("data")
TOKEN_TYPE = np.uint16
SPLITS = ("train", "val")
GPT2_VOCAB_SIZE = 50257
BYTES_VOCAB_SIZE = 256
CHECKED_TOKENS = 1024  # looked at, spread evenly over a split, before anything is done with it


class Tokenizer:
    """Text to tokens and back."""

    def decode(self, tokens):
        return self.decode_bytes(tokens).decode(errors="replace")


class GPT2Tokenizer(Tokenizer):
    """GPT-2's BPE, from tiktoken."""

    name = "gpt2"
    vocab_size = GPT2_VOCAB_SIZE

    def __init__(self):
        try:
            self.encoding = tiktoken.get_encoding("gpt2")
        except OSError as error:  # requests' errors are OSErrors
            raise OSError("cannot download the GPT-2 BPE files for tiktoken; with no network, set TIKTOKEN_CACHE_DIR "
                          f"to a folder that has them ({type(error).__name__})") from None
        self.end_of_text = self.encoding.eot_token

    def encode(self, text):
        """The tokens of a text, uint16; special tokens in it are plain text."""
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(TOKEN_TYPE)

    def decode_bytes(self, tokens):
        return self.encoding.decode_bytes([t for t in tokens if t < self.vocab_size])  # padded vocabularies have more


class BytesTokenizer(Tokenizer):
    """The bytes of UTF-8 as tokens; a document ends with a line end."""

    name = "bytes"
    vocab_size = BYTES_VOCAB_SIZE
    end_of_text = ord("\n")

    def encode(self, text):
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(TOKEN_TYPE)

    def decode_bytes(self, tokens):
        return np.asarray(tokens, dtype=np.uint8).tobytes()


def get_tokenizer(name):
    """The tokenizer that a meta.json names: "gpt2" or "bytes"."""
    tokenizers = {cls.name: cls for cls in (GPT2Tokenizer, BytesTokenizer)}
    if name not in tokenizers:
        raise UserError(f"unknown tokenizer {name!r}: it is one of {', '.join(tokenizers)}")
    return tokenizers[name]()


def tokenizer_class(vocab_size):
    """The tokenizer that a model's vocabulary tells: 256 are bytes, 50257 and the padded sizes above are GPT-2's."""
    if vocab_size == BYTES_VOCAB_SIZE:
        return BytesTokenizer
    if vocab_size >= GPT2_VOCAB_SIZE:
        return GPT2Tokenizer
    raise UserError(f"no tokenizer has the model's vocabulary of {vocab_size}: bytes have {BYTES_VOCAB_SIZE}, "
                    f"GPT-2's BPE has {GPT2_VOCAB_SIZE}")


def tokenizer_for(vocab_size):
    """The tokenizer of a model of this vocabulary."""
    return tokenizer_class(vocab_size)()


class DatasetWriter:
    """Writes data/<name>/ as a context manager: the files appear under their names when all of them are complete.

    with DatasetWriter("mytext", tokenizer, source="where it came from") as writer:
        writer.add("train", tokens_of_a_document)
    """

    def __init__(self, name, tokenizer, source):
        self.directory = DATA_DIR / name
        self.tokenizer = tokenizer
        self.source = source

    def __enter__(self):
        self.lock = lock(self.directory)
        self.paths = {split: self.directory / f"{split}.bin{ASIDE}" for split in SPLITS}
        self.files = {split: open(path, "wb") for split, path in self.paths.items()}
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
            elif isinstance(error, OSError):  # a write that fails does not say to which file
                error.filename = error.filename or str(self.directory)
        finally:
            for file in self.files.values():
                with suppress(OSError):  # where the disk is full, what is left in a buffer fails once more
                    file.close()
            remove_leftovers(self.directory)
            self.directory.joinpath(".lock").unlink()
            if not any(self.directory.iterdir()):
                self.directory.rmdir()
            self.lock.release()

    def finish(self):
        """Give the files their names; a reader in between finds counts in meta.json that are not those of the files."""
        tokens = {split: file.tell() // self.end_of_text.itemsize for split, file in self.files.items()}
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        for split in SPLITS:
            os.replace(self.paths[split], self.directory / f"{split}.bin")
        meta = dict(vocab_size=self.tokenizer.vocab_size, tokenizer=self.tokenizer.name, tokens=tokens,
                    documents=self.documents, source=self.source)
        with atomic_write(self.directory / "meta.json", "w") as file:
            file.write(json.dumps(meta, indent=2) + "\n")
        for split in SPLITS:
            print(f"{self.directory / split}.bin: {tokens[split]:,} tokens of {self.documents[split]:,} documents")


def find_dataset(name):
    """The directory of a data set.

    Raises:
        FileNotFoundError: there is none; the message names the command that makes it.
    """
    directory = DATA_DIR / name
    if not any((directory / f"{split}.bin").exists() for split in SPLITS):
        known = {"openwebtext": "python prepare_owt.py", "pydocs": "python prepare_pydocs.py"}
        command = known.get(name, f"python prepare_owt.py --data_files='*.txt' --out={name}")
        others = sorted(path.parent.name for path in DATA_DIR.glob("*/train.bin"))
        there = f" (there are: {', '.join(others)})" if others else ""
        raise FileNotFoundError(f"no data set in {directory}; make it with: {command}{there}")
    return directory


def load_meta(name):
    """The meta.json of a data set, with GPT-2's tokenizer and vocabulary where there is none.

    Raises:
        FileNotFoundError: no such data set.
        UserError: a meta.json that says nothing of use.
    """
    path = find_dataset(name) / "meta.json"
    if not path.exists():
        return dict(vocab_size=GPT2_VOCAB_SIZE, tokenizer=GPT2Tokenizer.name, tokens={})
    try:
        meta = dict(tokens={}) | json.loads(path.read_bytes())
        if not (isinstance(meta["vocab_size"], int) and isinstance(meta["tokenizer"], str)
                and isinstance(meta["tokens"], dict) and all(isinstance(n, int) for n in meta["tokens"].values())):
            raise TypeError("vocab_size and the numbers of tokens are whole numbers and tokenizer a string")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); prepare the data set again") from None
    return meta


def load_tokens(name, split, vocab_size, block_size=1):
    """The tokens of a split, memory-mapped.

    Args:
        name: of the data set, a directory under data/.
        split: "train" or "val".
        vocab_size: of the model that is to read them.
        block_size: the context that must fit into the split, with the target of its last token.

    Raises:
        FileNotFoundError: no such data set or split.
        UserError: the file is damaged or too short, or the tokens are not of this vocabulary.
    """
    path = find_dataset(name) / f"{split}.bin"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: prepare the data set again")
    meta = load_meta(name)
    if meta["vocab_size"] > vocab_size or meta["tokenizer"] != tokenizer_class(vocab_size).name:
        raise UserError(f"{path} holds {meta['tokenizer']} tokens with a vocabulary of {meta['vocab_size']}, and the "
                        f"model has a vocabulary of {vocab_size}: use data and a model that belong together")
    n_bytes = path.stat().st_size
    if n_bytes % np.dtype(TOKEN_TYPE).itemsize:
        raise UserError(f"{path} has {n_bytes} bytes, an odd number, so it is no file of uint16 tokens; prepare it again")
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


def unknown_token(token, tokens, position, vocab_size):
    where = f"{getattr(tokens, 'filename', 'the data')}, position {position}"
    return UserError(f"token {token} in {where}: the model's vocabulary ends at {vocab_size - 1}")


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
