"""prepare_owt.py --hub and --documents, on local directories that are laid out as data sets of the hub are."""
import json
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_here
from test_bad_input import write_byte_level_tokenizer

CONFIGS = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""


def texts_of(name, n):
    return [f"{name}, document {i}: naïve café." for i in range(n)]


def write_parquet(path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(len(texts)), column: texts}), path, row_group_size=10)


@pytest.fixture
def corpus(workdir, monkeypatch):
    """corpora/edu, in the layout of FineWeb-Edu: one configuration has 90 documents in three files, another 40 others."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(workdir / "cache"))
    write_byte_level_tokenizer("bytes")
    root = Path("corpora/edu")
    for i in range(3):
        write_parquet(root / f"sample/10BT/00{i}_00000.parquet", texts_of(f"sample {i}", 30))
    write_parquet(root / "data/CC-MAIN-2013-20/train-00000-of-00001.parquet", texts_of("all", 40))
    root.joinpath("README.md").write_text(CONFIGS)
    return root


def prepare(*options):
    return run_here("prepare_owt.py", "--tokenizer=bytes", "--val_fraction=0.1", *options)


def check_tokens(name, texts):
    """That a data set holds these texts, split and tokenized as nanoGPT's script does it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file("bytes/tokenizer.json")
    parts = datasets.Dataset.from_dict({"text": texts}).train_test_split(test_size=0.1, seed=2357, shuffle=True)
    for split, part in (("train", "train"), ("val", "test")):
        expected = [token for text in parts[part]["text"]
                    for token in [*tokenizer.encode(text).ids, tokenizer.token_to_id("<|endoftext|>")]]
        assert np.fromfile(f"data/{name}/{split}.bin", "<u2").tolist() == expected
    meta = json.loads(Path("data", name, "meta.json").read_text(encoding="utf-8"))
    assert meta["documents"] == dict(train=len(parts["train"]), val=len(parts["test"]))
    return meta["source"]


SAMPLE = [text for i in range(3) for text in texts_of(f"sample {i}", 30)]


@pytest.mark.parametrize("options, texts, source", [
    (["--hub_config=sample-10BT", "--documents=45"], SAMPLE[:45], "corpora/edu, sample-10BT, the first 45 documents"),
    (["--documents=1000"], texts_of("all", 40), "corpora/edu, the first 1,000 documents")])
def test_the_first_documents_are_streamed_and_split_as_ever(options, texts, source, corpus):
    said = prepare("--hub=corpora/edu", *options)
    assert said.returncode == 0, said.stderr
    assert check_tokens("edu", texts) == source and f"tokenized {len(texts)} documents" in said.stdout
    assert not [path for path in Path("cache").iterdir() if path.suffix != ".lock"]  # neither a copy nor a download


def test_the_column_is_an_option_of_files_too_and_nulls_are_skipped(corpus):
    texts = [*texts_of("other", 20), None, *texts_of("more", 20)]
    write_parquet(Path("corpora/plain/train.parquet"), texts, "content")
    Path("rows.jsonl").write_text("".join(json.dumps(dict(content=text)) + "\n" for text in texts), encoding="utf-8")
    for options in ["--hub=corpora/plain"], ["--data_files=corpora/plain/*.parquet", "--out=plain"], \
            ["--data_files=rows.jsonl", "--out=plain"]:
        said = prepare("--column=content", "--documents=30", *options)
        assert said.returncode == 0, said.stderr
        check_tokens("plain", list(filter(None, texts))[:30])


@pytest.mark.parametrize("options, status, said", [
    (["--hub=corpora/edu", "--documents=20", "--column=id"], 2,
     "corpora/edu, row 1 has no text in a column `id` (columns: id, text)"),
    (["--hub=corpora/edu", "--documents=20", "--hub_config=none"], 1, "not found. Available: ['default', 'sample-10BT']"),
    (["--hub=corpora/half", "--documents=20"], 1, "ArrowInvalid: "),
    (["--hub=corpora/edu"], 2, "--hub goes with --documents=N"),
    (["--documents=20"], 1, "Couldn't reach 'Skylion007/openwebtext' on the Hub"),
    (["--documents=0"], 2, "0 documents are too few")])
def test_what_cannot_be_streamed_is_one_line_and_writes_nothing(options, status, said, corpus):
    write_parquet(Path("corpora/half/a.parquet"), texts_of("whole", 10))
    Path("corpora/half/b.parquet").write_bytes(Path("corpora/half/a.parquet").read_bytes()[:-9])
    result = prepare("--out=mine", *options)
    assert result.returncode == status and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr and not Path("data").exists()


def test_a_stream_that_is_stopped_leaves_nothing(corpus, monkeypatch):
    load_dataset = datasets.load_dataset

    def stopped(*args, **options):
        yield from islice(load_dataset(*args, **options), 15)
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "load_dataset", stopped)
    said = prepare("--hub=corpora/edu", "--documents=30")
    assert "tokenized" not in said.stdout and "Traceback" not in said.stderr
    assert not Path("data").exists() and not [path for path in Path("cache").iterdir() if path.suffix != ".lock"]


def test_a_repository_with_a_script_is_streamed_from_the_copy_of_the_hub(corpus, monkeypatch):
    load_dataset = datasets.load_dataset

    def load(path, revision=None, **options):
        if revision != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported")
        return load_dataset("corpora/edu", **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    said = prepare("--documents=30", "--out=mine")
    assert said.returncode == 0, said.stderr
    assert check_tokens("mine", texts_of("all", 30)) == "Skylion007/openwebtext, the first 30 documents"


def test_a_process_that_streams_a_part_of_a_file_ends(corpus, run_script, workdir):
    """pyarrow's threads, which read ahead, have kept interpreters from their end (apache/arrow issue 45214)."""
    write_parquet(Path("corpora/large/a.parquet"), texts_of("large", 20_000))
    said = run_script("prepare_owt.py", "--hub=corpora/large", "--documents=20", "--tokenizer=bytes", cwd=workdir,
                      env={"HF_HOME": str(workdir / "home")}, timeout=60)
    assert said.returncode == 0 and "tokenized 20 documents" in said.stdout, said.stderr
