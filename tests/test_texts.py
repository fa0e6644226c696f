"""Text files as people have them: what prepare_owt.py and perplexity.py read of each."""
import bz2
import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_here
from pyarrow import feather
from test_data import config_of

from kronygpt.configurator import UserError
from kronygpt.data import read_pieces, read_rows
from kronygpt.tokenizer import GPT2Tokenizer
from perplexity import load_text_tokens

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


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def write_parquet(path, column, name="text"):
    pq.write_table(pa.table({name: column}), path)


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("pattern, names", [
    ("br/*.{}", ["a1", "a[1]", "b?", "b1", "c*d", "c::d", "{e}", "f,g"]),
    ("x[[]1]/**/*.{}", ["x[1]/a", "x[1]/y[2]/b"]),
    ("b[0]/a[1].{}", ["b[0]/a[1]"]),  # a name that is no pattern
])
def test_exactly_the_files_that_the_glob_finds_are_prepared(pattern, names, kind, prepare):
    expected = []
    for i, name in enumerate(names):
        path = Path(name if "/" in name else f"br/{name}").with_suffix(f".{kind}")
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [f"{text} Datei {i}" for text in ROWS[:5]]
        expected += texts
        if kind == "txt":
            path.write_text("\n\n".join(texts), encoding="utf-8")
        elif kind == "parquet":
            write_parquet(path, texts)
        else:
            write_jsonl(path, [dict(text=text) for text in texts])
    Path(names[0] if "/" in names[0] else "br").with_name("other").mkdir(exist_ok=True)
    said, documents = prepare(pattern.format(kind))
    assert said.returncode == 0, said.stderr
    assert documents == sorted(expected)


def test_line_ends_are_scored_as_they_are_in_the_file(workdir):
    content = b"\r\none\r\n\r\ntwo\rthree\n\n"
    Path("a.txt").write_bytes(content)
    tokens, n_bytes = load_text_tokens("a.txt", config_of(256))
    assert bytes(tokens.tolist()) == content and n_bytes == len(content)


@pytest.mark.parametrize("name, write", [
    ("rows.jsonl", lambda path: write_jsonl(path, [dict(text=text) for text in (*ROWS, None, None, None)])),
    ("rows.json", lambda path: Path(path).write_text(json.dumps([dict(text=text) for text in (*ROWS, None, None, None)]))),
    ("rows.parquet", lambda path: write_parquet(path, [*ROWS, None, None, None])),
])
def test_nulls_are_skipped_and_counted(name, write, prepare, shared):
    write(name)
    said, documents = prepare(name)
    assert said.returncode == 0, said.stderr
    assert documents == sorted(ROWS)
    assert said.stdout.splitlines()[-1].endswith("; 3 rows with a null for a text are skipped")
    assert load_text_tokens(name, config_of(256))[1] == len("\n\n".join(ROWS).encode())


@pytest.mark.parametrize("name, write, message", [
    ("a.jsonl", lambda path: write_jsonl(path, [dict(text="a"), dict(text=3)]), "a.jsonl, line 2: the `text` is no string"),
    ("a.jsonl", lambda path: write_jsonl(path, [["a"]] * 3), "a.jsonl, line 1 is no JSON with a string `text`"),
    ("a.ndjson", lambda path: write_jsonl(path, [dict(title="a")]), "line 1 is no JSON with a string `text`, but title"),
    ("a.json", lambda path: Path(path).write_text('[{"text": "a"}, {"text": {}}]'), "row 2: the `text` is no string"),
    ("a.json", lambda path: Path(path).write_text("3"), "a.json, row 1 is no JSON with a string `text`"),
    ("a.parquet", lambda path: write_parquet(path, [1, 2, 3]), "a.parquet: the `text` is no string but int"),
    ("a.parquet", lambda path: write_parquet(path, [["a"], ["b"]]), "a.parquet: the `text` is no string but list"),
    ("a.parquet", lambda path: write_parquet(path, ["a"], "title"), "a.parquet has the columns title, and no `text`"),
    ("a.parquet", lambda path: Path(path).write_text("no parquet"), "cannot read a.parquet: ArrowInvalid"),
    ("a.csv", lambda path: Path(path).write_text("id,title\n1,a\n"), "a.csv has the columns id, title, and no `text`"),
    ("a.csv", lambda path: Path(path).write_text("id,text\n1,a\n2,b, and more\n"), "a.csv, line 3 has more fields than"),
    ("a.tsv", lambda path: Path(path).write_text("a line\nand another\n"), "a.tsv has the columns a line, and no `text`"),
    ("a.txt.gz", lambda path: Path(path).write_bytes(gzip.compress(b"cut")[:-3]), "cannot read a.txt.gz: EOFError"),
    ("a.txt", lambda path: Path(path).write_text(POINTER), "a.txt is a git-lfs pointer"),
    ("a.parquet", lambda path: Path(path).write_text(POINTER), "a.parquet is a git-lfs pointer"),
])
def test_rows_that_are_no_text_are_one_line_in_both_scripts(name, write, message, prepare, gpt2_dir):
    write(name)
    for said in prepare(name)[0], run_here("perplexity.py", gpt2_dir, name):
        assert said.returncode == 2 and message in said.stderr and said.stderr.count("\n") == 1, said.stderr
    assert not Path("data/mine").exists()


def write_csv(path, delimiter):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("id", "text"), *enumerate(ROWS)])


def save(path, rows):
    from datasets import Dataset

    Dataset.from_dict(dict(id=range(len(rows)), text=rows)).save_to_disk(path)


@pytest.mark.parametrize("name, write", [
    ("rows.json", lambda path: Path(path).write_text(json.dumps([dict(text=text) for text in ROWS], indent=1))),
    ("rows.json", lambda path: Path(path).write_text(json.dumps(ROWS))),
    ("rows.json", lambda path: write_jsonl(path, [dict(text=text) for text in ROWS])),
    ("ROWS.JSONL", lambda path: write_jsonl(path, [dict(text=text) for text in ROWS])),
    ("rows.ndjson", lambda path: write_jsonl(path, [dict(text=text) for text in ROWS])),
    ("rows.jsonlines", lambda path: write_jsonl(path, [dict(text=text) for text in ROWS])),
    ("rows.jsonl.gz", lambda path: Path(path).write_bytes(
        gzip.compress("".join(json.dumps(dict(text=text)) + "\n" for text in ROWS).encode()))),
    ("rows.csv", lambda path: write_csv(path, ",")), ("rows.tsv", lambda path: write_csv(path, "\t")),
    ("rows.parquet", lambda path: write_parquet(path, ROWS)),
    ("saved", lambda path: save(path, ROWS)),
    ("saved/data-00000-of-00001.arrow", lambda path: save("saved", ROWS)),
    ("rows.arrow", lambda path: feather.write_feather(pa.table(dict(id=range(40), text=ROWS)), path)),
])
def test_rows_come_in_several_forms(name, write, prepare, gpt2_dir):
    write(name)
    assert list(read_rows(name)) == ROWS
    assert prepare(name)[1] == sorted(ROWS)
    assert load_text_tokens(name, config_of(256))[1] == len("\n\n".join(ROWS).encode())
    said = run_here("perplexity.py", gpt2_dir, name)
    assert said.returncode == 0 and said.stdout.splitlines()[-1].startswith(name), said.stderr


def test_a_compressed_text_is_the_text_and_several_splits_are_named(workdir):
    from datasets import Dataset, DatasetDict

    Path("a.txt.bz2").write_bytes(bz2.compress("ä\r\nb".encode()))
    assert list(read_rows("a.txt.bz2")) == ["ä\r\nb"]
    DatasetDict(train=Dataset.from_dict(dict(text=ROWS)), test=Dataset.from_dict(dict(text=["b"]))).save_to_disk("saved")
    with pytest.raises(UserError, match="saved has the splits train, test"):
        list(read_rows("saved"))
    assert list(read_rows("saved/test")) == ["b"]


def test_texts_of_a_column_of_categories_are_texts(workdir):
    write_parquet("a.parquet", pa.array(["a", "b", "a"]).dictionary_encode())
    assert list(read_rows("a.parquet")) == ["a", "b", "a"]


def test_a_lone_surrogate_is_replaced_in_both_scripts(prepare):
    Path("a.jsonl").write_text('{"text": "a\\ud83db"}\n{"text": "\\ud83d\\ude42"}\n')
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


@pytest.mark.parametrize("name", ["wiki.test.raw", "README.md", "noending", "[a]?.txt", "UPPER.TXT"])
def test_an_existing_file_is_a_text_for_perplexity(name, gpt2_dir, workdir):
    scores = []
    for path in name, "plain.txt":
        Path(path).write_text("Ein Text, irgendwo.\n" * 9)
        said = run_here("perplexity.py", gpt2_dir, path, "--json_out=out.json")
        assert said.returncode == 0, said.stderr
        scores.append(json.loads(Path("out.json").read_text())[path]["loss"])
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", ["data/mine/val.bin", "ckpt.pt", "tokens.npy"])
def test_a_file_of_tokens_is_no_text(name, gpt2_dir, workdir):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(range(1, 100)))
    said = run_here("perplexity.py", gpt2_dir, name)
    assert said.returncode == 2 and f"{name} is no text" in said.stderr and said.stderr.count("\n") == 1


def test_a_separator_ends_a_document(prepare):
    Path("a.txt").write_text("one\n\nstill one\n<|endoftext|>\ntwo<|endoftext|>three\n<|endoftext|>\n<|endoftext|>")
    said, documents = prepare("a.txt", "--separator=<|endoftext|>")
    assert documents == sorted(["one\n\nstill one", "two", "three"]) and "plain text" not in said.stdout
    said, documents = prepare("a.txt")
    assert len(documents) == 2 and said.stdout.splitlines()[-1].endswith(
        "; 1 have <|endoftext|> as plain text: --separator='<|endoftext|>' splits a .txt there")
    said, documents = prepare("a.txt", "--sample_by=line")
    assert len(documents) == 7
    assert "--sample_by is line, paragraph or document, not page" in prepare("a.txt", "--sample_by=page")[0].stderr


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("separator", ["\n\n", "<|endoftext|>", "\n"])
def test_pieces_do_not_depend_on_how_much_is_read_at_once(at_once, separator, workdir, monkeypatch):
    monkeypatch.setattr("kronygpt.data.CHARACTERS_AT_ONCE", at_once)
    text = "\n\n\na\n\n\n\nb <|endoftext|>\n<|endoftext|><|endoftext|c\n\n"
    workdir.joinpath("a.txt").write_text(text)
    assert list(read_pieces("a.txt", separator)) == text.split(separator)
    assert "".join(read_pieces("a.txt")) == text


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
def test_documents_of_a_txt_are_those_of_datasets(sample_by, prepare, workdir):
    from datasets import load_dataset

    for name, text in ("a", "a\n\n\nb\n\n\n\nc\nd\n"), ("b", "\ne\r\nf\r\n\r\ng\rh\r\r\n"):
        workdir.joinpath(f"{name}.txt").write_bytes(text.encode())
    theirs = load_dataset("text", data_files=["a.txt", "b.txt"], sample_by=sample_by, split="train", cache_dir="theirs")
    assert prepare("*.txt", f"--sample_by={sample_by}")[1] == sorted(theirs["text"])


def test_a_directory_in_brackets_holds_a_local_wikitext(workdir, gpt2_dir):
    Path("[w]/wikitext-2-v1").mkdir(parents=True)
    write_parquet("[w]/wikitext-2-v1/test-00000-of-00001.parquet", ["Ein Satz.", "Noch einer."])
    said = run_here("perplexity.py", gpt2_dir, "wiki2", "--wikitext=[w]")
    assert said.returncode == 0, said.stderr


def test_what_is_missing_is_said(workdir):
    with pytest.raises(UserError, match=r"cannot read none\.txt: FileNotFoundError"):
        list(read_rows("none.txt"))
    Path("latin.md").write_bytes("déjà".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read latin\.md: UnicodeDecodeError"):
        list(read_rows("latin.md"))
