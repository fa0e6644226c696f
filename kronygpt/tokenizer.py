"""Tokenizers: GPT-2's BPE, bytes, and those in Hugging Face directories, which are read as data.

A model keeps its tokenizer as a record in config.tokenizer: {"name": ..., "path": directory}, or None where the size of
the vocabulary tells it: 256 are bytes, 50257 and the padded sizes above are GPT-2's. The end of a name, behind the last
dash, is a fingerprint of the vocabulary: two names with the same end are names of one tokenizer.
"""
import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from kronygpt.configurator import UserError

TOKEN_TYPE = np.uint16
GPT2_VOCAB_SIZE = 50257
BYTES_VOCAB_SIZE = 256
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "unknown"  # the name of a tokenizer that nobody knows
READABLE = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
UNREADABLE = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
TOKENIZER_FILES = (*READABLE, *SETTINGS, *UNREADABLE)  # what a tokenizer of Hugging Face may consist of
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PROBE = "Don't  1234567\n\n naïve\t文🙂 <|endoftext|>x "  # tells GPT-2's BPE from others with the same vocabulary
GPT2_PROBE = [3987, 470, 220, 17031, 2231, 3134, 628, 41492, 197, 23877, 229, 8582, 25081, 1279, 91, 437, 1659, 5239, 91,
              29, 87, 220]


class Tokenizer:
    """Text to tokens (uint16) and back. Special tokens in a text are plain text, except in a prompt.

    A tokenizer has a name, a vocab_size, and end_of_text, the token after each document, or None.
    """

    end_name = END_OF_TEXT
    directory = None  # of its files, where it has some

    def decode(self, tokens):
        return self.decode_bytes(tokens).decode(errors="replace")

    def encode_prompt(self, text):
        """The tokens of a prompt, a list; END_OF_TEXT in it, or the tokenizer's own name for it, is the token."""
        if self.end_of_text is None:
            if not (tokens := self.encode(text).tolist()):  # where nothing is typed, or nothing that it knows
                raise UserError("the prompt is empty, and the model's tokenizer has no end-of-text token: type one")
            return tokens
        pieces = text.replace(self.end_name, END_OF_TEXT).split(END_OF_TEXT)
        tokens = [token for piece in pieces for token in (self.end_of_text, *(self.encode(piece).tolist() if piece else ()))]
        return tokens[1:] or tokens


class GPT2Tokenizer(Tokenizer):
    """GPT-2's BPE, from tiktoken."""

    name = "gpt2"
    fingerprint = "71cca498f566"
    vocab_size = GPT2_VOCAB_SIZE
    end_of_text = GPT2_VOCAB_SIZE - 1

    @property
    def encoding(self):
        try:
            return tiktoken.get_encoding("gpt2")  # downloaded, unless TIKTOKEN_CACHE_DIR has it
        except OSError as error:
            raise UserError(f"GPT-2's tokenizer could not be downloaded ({type(error).__name__}): is there a network?",
                            status=1) from None

    def encode(self, text):
        return self.encoding.encode_to_numpy(well_formed(text), disallowed_special=()).astype(TOKEN_TYPE)

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


KNOWN = {cls.name: cls for cls in (GPT2Tokenizer, BytesTokenizer)}  # told by the size of a vocabulary


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer in a directory: tokenizer.json, or vocab.json and merges.txt. No code of the directory runs."""

    def __init__(self, directory):
        self.directory = Path(directory).resolve()
        self.tokenizer = read_files(self.directory)
        self.vocabulary = self.tokenizer.get_vocab()  # {token: id}, added tokens included
        self.name = f"{self.directory.name}-{fingerprint(self.vocabulary)}"
        self.vocab_size = max(self.vocabulary.values()) + 1
        self.end_name = special_token(self.directory, "eos_token") or next(
            (token for token in (END_OF_TEXT, "</s>") if token in self.vocabulary), END_OF_TEXT)
        self.end_of_text = self.vocabulary.get(self.end_name)

    def encode(self, text):
        return np.array(self.tokenizer.encode(well_formed(text), add_special_tokens=False).ids, dtype=TOKEN_TYPE)

    def decode_bytes(self, tokens):
        if isinstance(self.tokenizer.decoder, decoders.ByteLevel):
            return b"".join(self.bytes_of_tokens.get(int(token), b"") for token in tokens)
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False).encode()

    @cached_property
    def bytes_of_tokens(self):
        """{id: bytes} of a byte-level vocabulary; the tokens that are added stand for their own text."""
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        added = self.tokenizer.get_added_tokens_decoder()
        return {number: bytes(map(byte_of.get, token)) if byte_of.keys() >= set(token) and number not in added
                else token.encode() for token, number in self.vocabulary.items()}


def well_formed(text):
    """The text with lone surrogates replaced, as tiktoken's encode() does: UTF-8 has no bytes for them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def bytes_to_unicode():
    """{byte: character} of byte-level BPE files: the printable ones are themselves, the others follow from U+0100."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return dict(zip(sorted(range(256), key=lambda byte: chr(byte) not in characters), characters))


def fingerprint(vocabulary):
    """The first digits of a sha256 of {token: id}."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()[:12]


def is_same(name, other):
    """Whether two names are of one tokenizer; directories may be renamed and copied."""
    return name.rpartition("-")[2] == other.rpartition("-")[2]


# ----------------------------------------------------------------------------------------------------------------------
# The files of a directory

def read_json(path, default=None):
    """The content of a JSON file, or the default where there is no file; a UserError names a file that is no JSON."""
    if default is not None and not path.exists():
        return default
    check_no_pointer(path)
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"cannot read {path}: {type(error).__name__}: {error}") from None


def check_no_pointer(path):
    """Raise UserError where a file is what git leaves in its place without git-lfs."""
    if Path(path).is_file():
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{path} is a git-lfs pointer and not the file itself: `git lfs pull` fetches that")


def special_token(directory, name):
    """The text of eos_token, bos_token or another one in a directory's settings, or None."""
    for settings in SETTINGS:
        token = read_json(directory / settings, {}).get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def read_files(directory):
    """The tokenizers.Tokenizer of a directory, with special tokens as plain text; UserError where it cannot be read."""
    one_file, vocab, merges, added = (directory / name for name in READABLE)
    try:
        if one_file.is_file():
            made = tokenizers.Tokenizer.from_file(str(one_file))
        else:
            made = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
            made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
            numbers = read_json(added, {})
            made.add_special_tokens([AddedToken(token, normalized=False) for token in sorted(numbers, key=numbers.get)])
            if any(made.token_to_id(token) != number for token, number in numbers.items()):
                raise ValueError("the numbers in added_tokens.json do not follow those in vocab.json")
    except Exception as error:  # the package raises Exception itself
        raise UserError(f"cannot read the tokenizer in {directory}: {' '.join(str(error).split())}") from None
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = True
    return made


def read_tokenizer(directory):
    """The tokenizer in a directory, or None where it has no files of one.

    GPT-2's own and bytes are told by their vocabulary and what they make of a text.

    Raises:
        UserError: they cannot be read.
    """
    directory = Path(directory)
    there = [name for name in (*READABLE, *UNREADABLE) if (directory / name).is_file()]
    if not there:
        return None
    if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= set(there):
        raise UserError(f"the tokenizer in {directory} is in a form that is not read here ({', '.join(there)}): "
                        "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes a tokenizer.json")
    found = HuggingFaceTokenizer(directory)
    tokens = found.encode(PROBE).tolist()
    if is_same(found.name, GPT2Tokenizer.fingerprint) and tokens == GPT2_PROBE:
        return GPT2Tokenizer()
    if tokens == list(PROBE.encode()) and found.vocab_size <= BYTES_VOCAB_SIZE + (END_OF_TEXT in found.vocabulary):
        return BytesTokenizer()
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer of a model

def tokenizer_record(directory):
    """The record of the tokenizer beside a model: {"name": ..., "path": absolute directory}, or None where the size of
    the vocabulary tells it. The name is "unknown" where the files cannot be read, which the weights do not need."""
    try:
        tokenizer = read_tokenizer(directory)
        name = tokenizer.name if tokenizer else None
    except UserError:
        name = UNKNOWN
    return None if name in (None, *KNOWN) else dict(name=name, path=str(Path(directory).resolve()))


def open_tokenizer(config, directory=None):
    """The Tokenizer of a model.

    Args:
        config: the model's: its `tokenizer`, a record or None, and its vocab_size.
        directory: of another tokenizer, which a person has named, or None.

    Raises:
        UserError: nobody knows it, it is not where it was, or it has changed.
    """
    name, path = tokenizer_name(config), directory or (config.tokenizer or {}).get("path")
    if path is None and name not in KNOWN:
        raise UserError(f"no tokenizer is known for the vocabulary of {config.vocab_size} (--tokenizer=DIRECTORY names one)")
    tokenizer = KNOWN[name]() if path is None else read_tokenizer(path)
    found = tokenizer.name if tokenizer else "no tokenizer"
    if tokenizer is None or not (directory or name == UNKNOWN or is_same(found, name)):
        raise UserError(f"{path} has {found}, and the model's is {name}: --tokenizer=DIRECTORY names the right one")
    return tokenizer


def tokenizer_name(config):
    """The name of a model's tokenizer, "unknown" where nobody knows it."""
    if config.tokenizer:
        return config.tokenizer["name"]
    if config.vocab_size == BYTES_VOCAB_SIZE:
        return BytesTokenizer.name
    return GPT2Tokenizer.name if config.vocab_size >= GPT2_VOCAB_SIZE else UNKNOWN


def fits(config, name, vocab_size):
    """Whether a model knows the tokens of a data set with a tokenizer of this name and vocab_size: its own is the same. A
    model may have more rows, or with a record of its tokenizer fewer; of an unknown one, the size is all that is known."""
    ours = tokenizer_name(config)
    is_size_right = vocab_size < config.vocab_size or config.tokenizer is not None
    return is_same(name, ours) and (vocab_size == config.vocab_size or (is_size_right and ours != UNKNOWN))


def stream_text(tokenizer, tokens, last):
    """Yield the text of each token as it comes, "" while a character is incomplete; after the last one, what was held back.

    The tokens continue a text that ends with the token `last`: some tokenizers write a token by the one before it.
    """
    held, shown = [last], tokenizer.decode([last])  # tokens to decode together, and how their text begins
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(held)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield ""
        else:
            yield text[len(shown):]
            held, shown = [token], tokenizer.decode([token])
    if rest := tokenizer.decode(held)[len(shown):]:
        yield rest
