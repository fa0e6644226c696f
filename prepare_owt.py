"""Tokenize OpenWebText, another corpus of the hub or your own text with GPT-2's BPE into data/<out>/{train,val}.bin.

    python prepare_owt.py                                           # OpenWebText, 17 GB of tokens
    python prepare_owt.py --documents=900000                        # 1.0 billion of its 9 billion tokens, streamed
    python prepare_owt.py --hub=HuggingFaceFW/fineweb-edu --hub_config=sample-10BT --documents=1000000 --out=fineweb_edu
    python prepare_owt.py --data_files='books/*.txt' --out=books    # local text, or rows with a `text`
    python prepare_owt.py --data_files=stories.txt --separator='<|endoftext|>' --out=stories
    python prepare_owt.py --tokenizer=models/german --out=german --data_files='german/*.txt'    # another model's tokenizer

The split and the tokens are those of nanoGPT's data/openwebtext/prepare.py: one document in 2000 is held out, with an
end-of-text token after each document. With --documents=N nothing but the first N is downloaded, into data/<out>/.scratch
while they are tokenized: a billion tokens of English take 7 GB of disk at the peak, and 2 GB in the end. All of OpenWebText
is first downloaded to the cache of `datasets`, HF_HOME. Local rows are .jsonl, .ndjson, .json, .csv, .tsv, .parquet or
.arrow, and nulls are skipped; any other file is a UTF-8 text; .gz, .bz2, .xz and .zst are unpacked.
"""
import gc
import glob
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path

from kronygpt.configurator import UserError, progress, run

out: str | None = None  # name of the data set, a directory under data/; default: openwebtext, or the last part of --hub
hub: str | None = None  # a data set of the Hugging Face hub, streamed; needs --documents; default: OpenWebText
hub_config: str | None = None  # name of its configuration, where it has several
documents: int | None = None  # only the first N documents; default: all
column = "text"  # name of the column, or field, with the texts
data_files: str | None = None  # glob of local files, in place of the hub
separator = "\n\n"  # text between documents in a .txt file, where \n is a line end; empty: the file is one document
tokenizer: str | None = None  # directory of a model with its tokenizer; default: GPT-2's
val_fraction = 0.0005  # share of the documents in the validation split
seed = 2357  # seed for the split

OPENWEBTEXT = "Skylion007/openwebtext"
DOCUMENTS_PER_TASK = 100  # in a thread's task: with one each, several threads are no faster than one
TASKS_AT_ONCE = 100  # before their tokens are written: bounds the memory


def find_files():
    """The local files that data_files names."""
    names = glob.glob(data_files, recursive=True) or [data_files]  # a name that is no pattern, as of a[1].txt alone
    files = sorted(name for name in names if Path(name).is_file())
    if not files:
        raise UserError(f"no files match --data_files={data_files}")
    return files


def read_documents(file):
    """Yield the documents of a local file."""
    from kronygpt.data import ROWS, kind_of, read_pieces, read_rows

    if kind_of(file) in ROWS:
        yield from read_rows(file, column)
    else:
        pieces = read_pieces(file, separator.replace("\\n", "\n"))
        yield from filter(None, (piece.strip("\n") for piece in pieces))


def hub_texts(name):
    """Yield the texts of a data set of the hub while it is downloaded."""
    from kronygpt.data import texts_of
    from kronygpt.hub import hub_dataset

    try:
        yield from texts_of(hub_dataset(name, hub_config, streaming=True), column, name)
    finally:
        gc.collect()  # ends pyarrow's threads: they read ahead, and at the interpreter's end would abort it


def gather(texts, path):
    """Write texts to an Arrow file, since order and split need their number, and return a datasets.Dataset of it, whose
    column is `text`."""
    from datasets import Dataset, Features, Value
    from datasets.arrow_writer import ArrowWriter

    from kronygpt.tokenizer import END_OF_TEXT, well_formed

    n_marked, features = 0, Features(text=Value("large_string"))
    with closing(texts), ArrowWriter(path=path, features=features, writer_batch_size=DOCUMENTS_PER_TASK) as writer, \
            progress(desc="reading", total=documents, unit="documents", unit_scale=True) as bar:
        for text in islice(texts, documents):
            bar.update()
            n_marked += END_OF_TEXT in text
            writer.write(dict(text=well_formed(text)))
        writer.finalize()
    if n_marked:
        print(f"{n_marked:,} documents have {END_OF_TEXT} as plain text: --separator='{END_OF_TEXT}' splits a .txt there")
    return Dataset.from_file(path)


def encode_all(part, split, ours):
    """Yield the tokens of the documents of a split, a datasets.Dataset."""
    tasks = part.iter(DOCUMENTS_PER_TASK)
    with ThreadPoolExecutor(os.cpu_count()) as pool, \
            progress(desc=f"tokenizing {split}", total=len(part), unit="documents", unit_scale=True) as bar:
        while some := list(islice(tasks, TASKS_AT_ONCE)):
            for tokens in pool.map(lambda task: [ours.encode(text) for text in task["text"]], some):
                yield from tokens
                bar.update(len(tokens))


def main():
    from kronygpt.data import DATA_DIR, scratch_folder, write_documents
    from kronygpt.hub import hub_dataset
    from kronygpt.tokenizer import GPT2Tokenizer, read_tokenizer

    if hub and (data_files or documents is None):
        raise UserError("--hub goes with --documents=N, the number to stream, and without --data_files")
    ours = read_tokenizer(tokenizer) if tokenizer else GPT2Tokenizer()
    if ours is None or ours.end_of_text is None:
        raise UserError(f"{tokenizer} has no tokenizer with an end-of-text token: its settings need an eos_token")
    ours.encode("")  # loads it: an error comes before the download
    name = data_files or hub or OPENWEBTEXT
    files = find_files() if data_files else None
    source = ", ".join(filter(None, [name, hub_config, documents and f"the first {documents:,} documents"]))
    directory = DATA_DIR / (out or (Path(hub).name if hub else "openwebtext"))
    with scratch_folder(directory) as scratch:
        if files or documents is not None:
            texts = (text for file in files for text in read_documents(file)) if files else hub_texts(name)
            dataset = gather(texts, str(scratch / "documents.arrow"))
        else:
            dataset = hub_dataset(name, hub_config)
        if len(dataset) < 2:
            raise UserError(f"{len(dataset)} documents are too few to split: --separator='\\n' makes more of a .txt")
        start = time.perf_counter()
        parts = dataset.train_test_split(test_size=val_fraction, seed=seed, shuffle=True)
        report = write_documents(directory, ours, source, {
            split: encode_all(parts[theirs], split, ours) for split, theirs in (("val", "test"), ("train", "train"))})
        print(f"{report}\ntokenized {len(dataset):,} documents in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run(main)
