"""Text files as people have them: what prepare_owt.py and perplexity.py read of each."""
import bz2
import csv
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_here
from datasets import Dataset, load_dataset
from test_data import config_of

from kronygpt.configurator import UserError
from kronygpt.data import read_pieces, read_rows
from kronygpt.tokenizer import GPT2Tokenizer
from perplexity import is_text, load_text_tokens

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
ROWS = [f"Zeile {i}: naïve \"café\",\nzweite Zeile." for i in range(40)]


@pytest.fixture
def prepare(workdir, shared):
    """Prepare data/mine of some files; returns what was said and the documents, in the order of their text."""
    def prepare(pattern, *options):
        said = run_here("prepare_owt.py", f"--data_files={pattern}", "--out=mine", "--val_fraction=0.1", *options)
        if said.returncode:
            return said, None
        tokens = np.concatenate([np.fromfile(f"data/mine/{split}.bin", "<u2") for split in ("train", "val")])
        ends = np.flatnonzero(tokens == 50256)
        return said, sorted(GPT2Tokenizer().decode(part[part != 50256].tolist()) for part in np.split(tokens, ends)[:-1])

    return prepare


@pytest.mark.parametrize("pattern, names", [
    ("br/*.txt", ["br/a1", "br/a[1]", "br/b?", "br/c*d", "br/c::d", "br/{e}", "br/f,g"]),
    ("x[[]1]/**/*.txt", ["x[1]/a", "x[1]/y[2]/b"]),
    ("b[0]/a[1].txt", ["b[0]/a[1]"]),  # a name that is no pattern
])
def test_exactly_the_files_that_the_glob_finds_are_prepared(pattern, names, prepare):
    for name in names:
        path = Path(f"{name}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"one of {name}\n\ntwo of {name}", encoding="utf-8")
    said, documents = prepare(pattern)
    assert documents == sorted(f"{n} of {name}" for name in names for n in ("one", "two")), said.stderr


def test_line_ends_are_scored_as_they_are_in_the_file(workdir):
    content = b"\r\none\r\n\r\ntwo\rthree\n\n"
    Path("a.txt").write_bytes(content)
    tokens, n_bytes = load_text_tokens("a.txt", config_of(256))
    assert bytes(tokens.tolist()) == content and n_bytes == len(content)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_nulls_are_skipped(name, prepare):
    rows = Dataset.from_dict(dict(text=[*ROWS, None, None]))
    rows.to_json(name) if name == "rows.jsonl" else rows.to_parquet(name)
    said, documents = prepare(name)
    assert documents == sorted(ROWS), said.stderr
    assert load_text_tokens(name, config_of(256))[1] == len("\n\n".join(ROWS).encode())


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "a.jsonl, row 2 has no text in a column `text`"),
    ("a.ndjson", b'["a"]\n', "a.ndjson, row 1 has no text in a column `text` (columns: none)"),
    ("a.ndjson", b'["a"]\n["b"]\n', "cannot read a.ndjson, line 1: JSONDecodeError: Extra data"),
    ("a.json", b'{\n"text": "a"}', "cannot read a.json, line 1: JSONDecodeError"),
    ("a.jsonl", b'{"text": "a"}\n\n{"te', "cannot read a.jsonl, line 3: JSONDecodeError"),
    ("a.json", b'[{"title": "a"}]', "a.json, row 1 has no text in a column `text` (columns: title)"),
    ("a.parquet", pa.table(dict(text=[["a"], ["b"]])), "row 1 has no text in a column `text`"),
    ("a.parquet", pa.table(dict(title=["a"])), "cannot read a.parquet: KeyError: 'Field \"text\" does not"),
    ("a.parquet", b"no parquet", "cannot read a.parquet: ArrowInvalid"),
    ("a.csv", b"id,title\n1,a\n", "cannot read a.csv: ArrowKeyError: Column 'text' in include_columns does not exist"),
    ("a.csv", b"text\nHello, world\n", "cannot read a.csv: ArrowInvalid: CSV parse error: Row #2: Expected 1 columns"),
    ("a.csv", b"id,text\n1,a\n2\n", "cannot read a.csv: ArrowInvalid: CSV parse error: Row #3: Expected 2 columns"),
    ("a.csv", b"text\nd\xe9j\xe0\n", "invalid UTF8 data"),
    ("a.txt.gz", gzip.compress(b"cut")[:-3], "cannot read a.txt.gz: EOFError"),
    ("latin.md", b"d\xe9j\xe0", "cannot read latin.md: UnicodeDecodeError"),
    ("a.txt", POINTER, "a.txt is a git-lfs pointer"),
    ("a.parquet", POINTER, "a.parquet is a git-lfs pointer"),
])
def test_what_is_no_text_is_one_line_that_names_the_place(name, content, message, workdir):
    Path(name).write_bytes(content) if isinstance(content, bytes) else pq.write_table(content, name)
    with pytest.raises(UserError, match=re.escape(message)):
        list(read_rows(name))


def test_rows_come_in_several_forms(workdir):
    rows = [dict(id=i, text=text) for i, text in enumerate(ROWS)]
    lines, table = "".join(json.dumps(row) + "\n" for row in rows).encode(), pa.Table.from_pylist(rows)
    files = {"rows.json": json.dumps(rows, indent=1).encode(), "lines.json": lines, "ROWS.JSONL": lines,
             "rows.ndjson": lines, "rows.jsonlines": lines, "rows.jsonl.gz": gzip.compress(lines)}
    for name, content in files.items():
        Path(name).write_bytes(content)
    for name, delimiter in ("rows.csv", ","), ("rows.tsv", "\t"):
        with open(name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([("id", "text"), *enumerate(ROWS)])
    pq.write_table(table, "rows.parquet")
    pq.write_table(pa.table(dict(text=pa.array(ROWS).dictionary_encode())), "categories.parquet")
    Dataset.from_list(rows).save_to_disk("saved")
    for name in (*files, "rows.csv", "rows.tsv", "rows.parquet", "categories.parquet", "saved/data-00000-of-00001.arrow"):
        assert list(read_rows(name)) == ROWS, name


def test_a_table_with_words_that_stand_for_nulls_elsewhere_has_them_as_texts(workdir):
    texts = ["NA", "null", "", "3", "1e5", 'he "said" so', "\ufeff", "a\r\nb"]
    with open("a.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "id"), *((text, i) for i, text in enumerate(texts))])
    assert list(read_rows("a.csv")) == texts


def test_a_compressed_text_is_the_text(workdir):
    Path("a.txt.bz2").write_bytes(bz2.compress("ä\r\nb".encode()))
    assert list(read_rows("a.txt.bz2")) == ["ä\r\nb"]


def test_a_lone_surrogate_is_replaced_in_both_scripts(prepare):
    Path("a.jsonl").write_text('{"text": "a\\ud83db"}\n{"text": "\\ud83d\\ude42"}\n', encoding="utf-8")
    said, documents = prepare("a.jsonl")
    assert said.returncode == 0, said.stderr
    assert documents == sorted(["a\ufffdb", "🙂"])
    tokens, n_bytes = load_text_tokens("a.jsonl", config_of(256))
    assert bytes(tokens.tolist()) == "a\ufffdb\n\n🙂".encode() and n_bytes == len(tokens)


def test_a_byte_order_mark_and_empty_lines_are_no_text(prepare):
    Path("a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\n\n  \n')
    assert prepare("a.jsonl")[1] == ["a", "b"] and list(read_rows("a.jsonl")) == ["a", "b"]
    Path("a.txt").write_bytes("\ufeffä\n\nb".encode())
    assert prepare("a.txt")[1] == ["b", "ä"] and list(read_rows("a.txt")) == ["ä\n\nb"]


@pytest.mark.parametrize("name", ["wiki.test.raw", "noending", "[a]?.txt", "UPPER.TXT"])
def test_an_existing_file_is_a_text_for_perplexity(name, workdir):
    Path(name).write_text("Ein Text", encoding="utf-8")
    assert is_text(name) and bytes(load_text_tokens(name, config_of(256))[0].tolist()) == b"Ein Text"


def test_a_separator_ends_a_document(prepare):
    Path("a.txt").write_text("one\n\nstill one\n<|endoftext|>\ntwo<|endoftext|>three\n<|endoftext|>\n<|endoftext|>",
                             encoding="utf-8")
    said, documents = prepare("a.txt", "--separator=<|endoftext|>")
    assert documents == sorted(["one\n\nstill one", "two", "three"]) and "plain text" not in said.stdout
    said, documents = prepare("a.txt")
    line = "1 documents have <|endoftext|> as plain text: --separator='<|endoftext|>' splits a .txt there"
    assert len(documents) == 2 and line in said.stdout.splitlines()
    assert len(prepare("a.txt", r"--separator=\n")[1]) == 6


@pytest.mark.parametrize("at_once", [1, 2, 7, 1000])
@pytest.mark.parametrize("separator", ["\n\n", "<|endoftext|>", "\n"])
def test_pieces_do_not_depend_on_how_much_is_read_at_once(at_once, separator, workdir, monkeypatch):
    monkeypatch.setattr("kronygpt.data.CHARACTERS_AT_ONCE", at_once)
    text = "\n\n\na\n\n\n\nb <|endoftext|>\n<|endoftext|><|endoftext|c\n\n"
    workdir.joinpath("a.txt").write_text(text)
    assert list(read_pieces("a.txt", separator)) == text.split(separator)
    assert list(read_pieces("a.txt")) == [text]


@pytest.mark.parametrize("separator, sample_by", [(r"\n", "line"), (r"\n\n", "paragraph"), ("", "document")])
def test_documents_of_a_txt_are_those_of_datasets(separator, sample_by, prepare, workdir):
    for name, text in ("a", "a\n\n\nb\n\n\n\nc\nd\n"), ("b", "\ne\r\nf\r\n\r\ng\rh\r\r\n"):
        workdir.joinpath(f"{name}.txt").write_bytes(text.encode())
    theirs = load_dataset("text", data_files=["a.txt", "b.txt"], sample_by=sample_by, split="train", cache_dir="theirs")
    stripped = [text.strip("\n") for text in theirs["text"]]
    assert prepare("*.txt", f"--separator={separator}")[1] == sorted(filter(None, stripped))
