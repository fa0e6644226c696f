"""Tokenizers: GPT-2's BPE, bytes, and those in Hugging Face directories, which are read as data.

A model keeps its tokenizer as a record, {"name": ..., "path": directory}, or as None where the size of the vocabulary
tells it: 256 are bytes, 50257 and the padded sizes above are GPT-2's. Names of two tokenizers with the same end, behind
the last dash, are names of one tokenizer: it is a fingerprint of the vocabulary.
"""
import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from kronygpt.configurator import UserError

TOKEN_TYPE = np.uint16
LARGEST_VOCABULARY = 2**16
GPT2_VOCAB_SIZE = 50257
BYTES_VOCAB_SIZE = 256
END_OF_TEXT = "<|endoftext|>"
GPT2_FINGERPRINT = "71cca498f566a6fce90612118ffe70ec265ffdc746e7e6743a2253d346af4d30"
READABLE = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
UNREADABLE = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (*READABLE, *SETTINGS, *UNREADABLE[:-1])  # what a tokenizer of Hugging Face may consist of


def well_formed(text):
    """The text with lone surrogates replaced, as tiktoken's encode() does: UTF-8 has no bytes for them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer:
    """Text to tokens (uint16) and back. Special tokens in a text are plain text, except in a prompt."""

    end_name = END_OF_TEXT
    directory = None  # of its files, where it has some

    def decode(self, tokens):
        return self.decode_bytes(tokens).decode(errors="replace")

    def encode_prompt(self, text):
        """The tokens of a prompt, a list; END_OF_TEXT in it, or the tokenizer's own name for it, is the token."""
        if self.end_of_text is None:
            return self.encode(text).tolist()
        first, *others = text.replace(self.end_name, END_OF_TEXT).split(END_OF_TEXT)
        tokens = self.encode(first).tolist() if first else []
        for piece in others:
            tokens += [self.end_of_text, *(self.encode(piece).tolist() if piece else [])]
        return tokens or [self.end_of_text]


class GPT2Tokenizer(Tokenizer):
    """GPT-2's BPE, from tiktoken."""

    name = "gpt2"
    vocab_size = GPT2_VOCAB_SIZE
    end_of_text = GPT2_VOCAB_SIZE - 1

    @cached_property
    def encoding(self):
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:  # requests' errors are OSErrors
            raise OSError("cannot download the GPT-2 BPE files for tiktoken; with no network, set TIKTOKEN_CACHE_DIR "
                          f"to a folder that has them ({type(error).__name__})") from None

    def encode(self, text):
        try:
            tokens = self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            tokens = self.encoding.encode_to_numpy(well_formed(text), disallowed_special=())
        return tokens.astype(TOKEN_TYPE)

    def decode_bytes(self, tokens):
        return self.encoding.decode_bytes([t for t in tokens if t < self.vocab_size])  # padded vocabularies have more


class BytesTokenizer(Tokenizer):
    """The bytes of UTF-8 as tokens; a document ends with a line end."""

    name = "bytes"
    vocab_size = BYTES_VOCAB_SIZE
    end_of_text = ord("\n")

    def encode(self, text):
        return np.frombuffer(well_formed(text).encode(), dtype=np.uint8).astype(TOKEN_TYPE)

    def decode_bytes(self, tokens):
        return np.asarray(tokens, dtype=np.uint8).tobytes()


class UnknownTokenizer(Tokenizer):
    """The tokenizer of a model that nobody knows: it has no text, and its tokens are written as numbers."""

    name = "unknown"
    end_of_text = 0

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, text):
        raise no_tokenizer(self.vocab_size)

    def decode_bytes(self, tokens):
        """None: nobody knows."""

    def decode(self, tokens):
        return " ".join(str(int(token)) for token in tokens)


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer in a directory: tokenizer.json, or vocab.json and merges.txt. No code of the directory runs."""

    def __init__(self, directory):
        self.directory = Path(directory).resolve()
        vocabulary, _ = read_vocabulary(self.directory)
        self.name = full_name(self.directory, vocabulary)
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > LARGEST_VOCABULARY:
            raise UserError(f"the tokenizer in {directory} has {self.vocab_size:,} tokens: data sets are uint16, which "
                            f"holds {LARGEST_VOCABULARY:,}")
        self.tokenizer = build(self.directory, vocabulary)
        self.n_text_tokens = max(self.tokenizer.get_vocab(with_added_tokens=False).values(), default=0) + 1
        self.end_name = special_token(self.directory, "eos_token") or next(
            (token for token in (END_OF_TEXT, "</s>") if token in vocabulary), END_OF_TEXT)
        self.end_of_text = vocabulary.get(self.end_name)

    def encode(self, text):
        ids = self.tokenizer.encode(well_formed(text), add_special_tokens=False).ids
        return np.array(ids, dtype=TOKEN_TYPE)

    def decode_bytes(self, tokens):
        from tokenizers import decoders

        if isinstance(self.tokenizer.decoder, decoders.ByteLevel):
            return b"".join(self.bytes_of_tokens.get(int(token), b"") for token in tokens)
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False).encode()

    @cached_property
    def bytes_of_tokens(self):
        """{id: bytes} of a byte-level vocabulary; the tokens that are added stand for their own text."""
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        added = self.tokenizer.get_added_tokens_decoder()

        def bytes_of(token, number):
            is_text = number in added or not all(character in byte_of for character in token)
            return token.encode() if is_text else bytes(byte_of[character] for character in token)

        return {number: bytes_of(token, number) for token, number in self.tokenizer.get_vocab().items()}


def bytes_to_unicode():
    """{byte: character} of byte-level BPE files: the printable ones are themselves, the others follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def fingerprint(vocabulary):
    """A sha256 of {token: id}, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


def full_name(directory, vocabulary):
    return f"{directory.name}-{fingerprint(vocabulary)[:12]}"


def is_same(name, other):
    """Whether two names are of one tokenizer; directories may be renamed and copied."""
    return name.rpartition("-")[2] == other.rpartition("-")[2]


def read_json(path, default=None):
    """The content of a JSON file, a dict; default where there is no file.

    Raises:
        UserError: it cannot be read as that.
    """
    if default is not None and not path.exists():
        return default
    try:
        if not path.is_file():
            raise ValueError("no regular file")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {type(error).__name__}: {error}") from None
    return content


def has_tokenizer(directory):
    return (directory / "tokenizer.json").is_file() or all((directory / name).is_file() for name in READABLE[1:3])


def read_vocabulary(directory):
    """The tokens of a directory's tokenizer.

    Returns:
        {token: id}, added tokens included, and whether its BPE sees a text as it is.
    """
    path = directory / "tokenizer.json"
    try:
        if path.is_file():
            content = read_json(path)
            vocabulary = content["model"]["vocab"]
            if isinstance(vocabulary, list):  # Unigram: [[token, score], ...]
                vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
            vocabulary = vocabulary | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
            splits = json.dumps(content.get("pre_tokenizer"))
            is_plain = content.get("normalizer") is None and '"add_prefix_space": true' not in splits
        else:
            path = directory / "vocab.json"
            vocabulary, is_plain = read_json(path) | read_json(directory / "added_tokens.json", {}), True
        if not vocabulary or not all(type(number) is int and number >= 0 for number in vocabulary.values()):
            raise ValueError("its vocabulary is not of tokens and their numbers")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no tokenizer that can be read: {type(error).__name__}: {error}") from None
    return vocabulary, is_plain


def build(directory, vocabulary):
    """The tokenizers.Tokenizer of a directory, whose special tokens are plain text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    try:
        if (directory / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        else:
            tokenizer = Tokenizer(models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt")))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            added = read_json(directory / "added_tokens.json", {})
            tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in sorted(added, key=added.get)])
    except UserError:
        raise
    except Exception as error:  # the package raises Exception itself
        raise UserError(f"cannot read the tokenizer in {directory}: {' '.join(str(error).split())}") from None
    wrong = next((t for t, number in vocabulary.items() if tokenizer.token_to_id(t) != number), None)
    if wrong is not None:
        raise UserError(f"the tokenizer in {directory} is damaged: {wrong!r} is token {vocabulary[wrong]}, and the "
                        f"tokenizers package makes it {tokenizer.token_to_id(wrong)}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def special_token(directory, name):
    """The text of eos_token, bos_token or another one in a directory's settings, or None."""
    for settings in SETTINGS:
        token = read_json(directory / settings, {}).get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def recognize(directory):
    """The class and the name of the tokenizer in a directory, or None where it has no files of one."""
    directory = Path(directory).resolve()
    if not has_tokenizer(directory):
        others = [name for name in UNREADABLE if (directory / name).exists()]
        return (UnknownTokenizer, UnknownTokenizer.name) if others else None
    vocabulary, is_plain = read_vocabulary(directory)
    mark = fingerprint(vocabulary)
    if is_plain and mark == GPT2_FINGERPRINT:
        return GPT2Tokenizer, GPT2Tokenizer.name
    byte_level = {character: byte for byte, character in bytes_to_unicode().items()}
    if is_plain and mark in (fingerprint(byte_level), fingerprint(byte_level | {END_OF_TEXT: BYTES_VOCAB_SIZE})):
        return BytesTokenizer, BytesTokenizer.name
    return HuggingFaceTokenizer, full_name(directory, vocabulary)


def read_tokenizer(directory):
    """The tokenizer in a directory, or None where it has no files of one.

    GPT-2's own is told by its vocabulary, which takes no files of tiktoken's.

    Raises:
        UserError: they cannot be read.
    """
    found = recognize(directory)
    if found is None:
        return None
    cls, _ = found
    if cls is UnknownTokenizer:
        others = ", ".join(name for name in UNREADABLE if (Path(directory) / name).exists())
        raise UserError(f"the tokenizer in {directory} is in a form that is not read here ({others}): write its "
                        "tokenizer.json with transformers, AutoTokenizer.from_pretrained(...).save_pretrained(...)")
    return cls(directory) if cls is HuggingFaceTokenizer else cls()


def tokenizer_record(directory):
    """The record of the tokenizer beside a model: {"name": ..., "path": absolute directory}, or None where the size of
    the vocabulary tells it."""
    found = recognize(directory)
    if found is None or found[0] in (GPT2Tokenizer, BytesTokenizer):
        return None
    return dict(name=found[1], path=str(Path(directory).resolve()))


def open_tokenizer(config, directory=None):
    """The tokenizer of a model.

    Args:
        config: the model's: its `tokenizer`, a record or None, and its vocab_size.
        directory: of another tokenizer, which a person has named, or None.

    Returns:
        A Tokenizer; an UnknownTokenizer, which refuses text, where nobody knows it.

    Raises:
        UserError: it is not where it was, has changed, or has more tokens than the model.
    """
    record, vocab_size = checked(config.tokenizer), config.vocab_size
    path = directory or (record["path"] if record else None)
    if path is None:
        cls = None if record else class_for(vocab_size)
        return cls() if cls else UnknownTokenizer(vocab_size)
    tokenizer = read_tokenizer(path)
    if tokenizer is None:
        there = "" if directory else f", where that of the model was ({record['name']}): --tokenizer=DIRECTORY names another"
        raise UserError(f"no tokenizer in {path}: neither tokenizer.json nor vocab.json with merges.txt{there}")
    if not directory and record["name"] != UnknownTokenizer.name and not is_same(tokenizer.name, record["name"]):
        raise UserError(f"the tokenizer in {path} is {tokenizer.name}, and the model was made with {record['name']}: "
                        "--tokenizer=DIRECTORY names the right one")
    if getattr(tokenizer, "n_text_tokens", tokenizer.vocab_size) > vocab_size:
        raise UserError(f"the tokenizer in {path} has {tokenizer.vocab_size} tokens, and the model has a vocabulary of "
                        f"{vocab_size}: --tokenizer=DIRECTORY names the model's own")
    return tokenizer


def checked(record):
    """A record, or None where a file that others wrote has something else in its place."""
    is_record = (isinstance(record, dict) and isinstance(record.get("name"), str)
                 and isinstance(record.get("path", 0), str | None))
    return record if is_record else None


def class_for(vocab_size):
    """The class of tokenizer that a vocabulary's size tells, or None."""
    if vocab_size == BYTES_VOCAB_SIZE:
        return BytesTokenizer
    return GPT2Tokenizer if vocab_size >= GPT2_VOCAB_SIZE else None


def no_tokenizer(vocab_size):
    return UserError(f"no tokenizer has the model's vocabulary of {vocab_size}: bytes have {BYTES_VOCAB_SIZE}, GPT-2's "
                     f"BPE has {GPT2_VOCAB_SIZE}; --tokenizer=DIRECTORY names another")


def tokenizer_name(config):
    """The name of a model's tokenizer, "unknown" where nobody knows it."""
    record = checked(config.tokenizer)
    return record["name"] if record else (class_for(config.vocab_size) or UnknownTokenizer).name
