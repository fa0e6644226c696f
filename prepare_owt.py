"""Tokenize OpenWebText, another corpus of the hub or your own text with GPT-2's BPE into data/<out>/{train,val}.bin.

    python prepare_owt.py                                           # OpenWebText, 17 GB of tokens
    python prepare_owt.py --documents=900000                        # 1.0 billion of its 9 billion tokens, streamed
    python prepare_owt.py --hub=HuggingFaceFW/fineweb-edu --hub_config=sample-10BT --documents=1000000 --out=fineweb_edu
    python prepare_owt.py --hub=karpathy/climbmix-400b-shuffle --documents=1000000 --out=climbmix
    python prepare_owt.py --data_files='books/*.txt' --out=books    # local .txt, .jsonl, .json or .parquet, with a `text`
    python prepare_owt.py --data_files=stories.txt --separator='<|endoftext|>' --out=stories
    python prepare_owt.py --tokenizer=models/german --out=german --data_files='german/*.txt'    # that of another model

The split and the tokens are those of nanoGPT's data/openwebtext/prepare.py: one document in 2000 is held out, seed
2357, an end-of-text token after each document. The other scripts take the data set by its name, `--dataset=<out>`.
With --documents=N the first N of a corpus are streamed, and nothing else is downloaded. The disk holds their text, while
they are tokenized, and their tokens: a billion tokens of English take about 7 GB for a while, and 2 GB in the end.
"""
import gc
import glob
import math
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

from kronygpt.configurator import UserError, check_choice, check_range, run

out: str | None = None  # name of the data set, a directory under data/; default: openwebtext, or the last part of --hub
hub: str | None = None  # a data set of the Hugging Face hub, streamed; needs --documents; default: OpenWebText
hub_config: str | None = None  # name of its configuration, where it has several
documents: int | None = None  # only the first N documents; default: all
column = "text"  # name of the column, or field, with the texts
data_files: str | None = None  # glob of local .txt, .jsonl, .json or .parquet files, in place of the hub
sample_by = "paragraph"  # a document in a .txt file: line, paragraph (between blank lines) or document (the file)
separator: str | None = None  # text between documents in a .txt file, such as <|endoftext|>; default: as sample_by says
tokenizer: str | None = None  # directory of a model with its tokenizer; default: GPT-2's
val_fraction = 0.0005  # share of the documents in the validation split
seed = 2357  # of the split
threads = os.cpu_count() or 1  # tokenizer threads

OPENWEBTEXT = "Skylion007/openwebtext"
PARQUET = "refs/convert/parquet"  # the hub's own copy of a data set
NO_NETWORK = "with no network, --data_files=FILES reads local files"
TEXT_KINDS = {".txt", ".md", ".raw"}
ROW_KINDS = {".jsonl", ".json", ".parquet"}
DOCUMENTS_AT_ONCE = 2000  # read and tokenized together: bounds the memory
CHARACTERS_AT_ONCE = 2**24  # or as many characters, where documents are long
DOCUMENTS_PER_TASK = 100  # in a thread's task: with one each, several threads are no faster than one


def find_files():
    """The local files that data_files names, which are all of one kind."""
    names = glob.glob(data_files, recursive=True) or [data_files]  # a name that is no pattern, as of a[1].txt alone
    files = sorted(name for name in names if Path(name).is_file())
    if not files:
        raise UserError(f"no files match --data_files={data_files}")
    kinds = {Path(file).suffix.lower() for file in files}
    if not (kinds <= TEXT_KINDS or (len(kinds) == 1 and kinds <= ROW_KINDS)):
        raise UserError(f"--data_files={data_files} matches {', '.join(sorted(kinds))}: "
                        f"give files of one kind, of {', '.join(sorted(TEXT_KINDS | ROW_KINDS))}")
    return files


def read_documents(file):
    """Yield the documents of a local file, None for a row whose text is null."""
    from kronygpt.data import read_pieces, read_rows

    if Path(file).suffix.lower() in ROW_KINDS:
        yield from read_rows(file, column)
    elif separator:
        yield from filter(None, (piece.strip("\n") for piece in read_pieces(file, separator)))
    elif sample_by == "document":
        yield "".join(read_pieces(file))
    elif sample_by == "line":
        with_end = read_pieces(file, "\n")
        previous = next(with_end)
        for line in with_end:
            yield previous
            previous = line
        if previous:  # behind the last line end is no line
            yield previous
    else:
        yield from filter(None, read_pieces(file, "\n\n"))


def hub_rows(name):
    """Yield the rows of a data set of the hub while they are downloaded; OSError where that fails."""
    from kronygpt.hub import reach_hub

    reach_hub()
    from datasets import load_dataset

    options = dict(name=hub_config, split="train", streaming=True)
    try:
        try:
            rows = load_dataset(name, **options)
        except RuntimeError:  # the repository still holds a script, which datasets 4 and later refuses
            rows = load_dataset(name, revision=PARQUET, **options)
        yield from rows
    except Exception as error:  # those of a network have no class in common
        raise OSError(f"cannot load {name} ({type(error).__name__}: {error}); {NO_NETWORK}") from None
    finally:
        gc.collect()  # ends pyarrow's threads: they read ahead, and at the interpreter's end would abort it


def hub_texts(name):
    """Yield the texts of a data set of the hub, None for a null."""
    with closing(hub_rows(name)) as rows:
        for row in rows:
            if not isinstance(row.get(column, 0), str | None):
                raise UserError(f"{name} has no texts in a column `{column}`; its columns are {', '.join(row)}: name one "
                                "with --column")
            yield row[column]


@contextmanager
def gathered(texts):
    """The first texts of a generator, None for a null, as one datasets.Dataset with a column `text`, and a remark on what
    was left out.

    They are written once, to a file that lives as long as the context: `datasets` itself takes names for patterns, and
    two files of one name, size and time for one.
    """
    import pyarrow as pa
    from datasets import Dataset, config
    from tqdm import tqdm

    from kronygpt.tokenizer import END_OF_TEXT, well_formed

    schema = pa.schema({"text": pa.large_string()})
    Path(config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.HF_DATASETS_CACHE, ignore_cleanup_errors=True) as folder:
        path, n_nulls, n_marked, batch, size = f"{folder}/documents.arrow", 0, 0, [], 0
        with closing(texts), pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            first = islice(texts, documents)
            for text in tqdm(first, "reading", documents, leave=False, unit="doc", unit_scale=True, disable=None):
                if text is None:
                    n_nulls += 1
                    continue
                batch.append(well_formed(text))
                size += len(text)
                n_marked += END_OF_TEXT in text
                if len(batch) == DOCUMENTS_AT_ONCE or size > CHARACTERS_AT_ONCE:
                    writer.write_batch(pa.record_batch([batch], schema))
                    batch, size = [], 0
            writer.write_batch(pa.record_batch([batch], schema))
        remarks = [f"; {n_nulls:,} rows with a null for a text are skipped"] if n_nulls else []
        if n_marked:
            remarks.append(f"; {n_marked:,} have {END_OF_TEXT} as plain text: "
                           f"--separator='{END_OF_TEXT}' splits a .txt there")
        yield Dataset.from_file(path), "".join(remarks)


@contextmanager
def openwebtext():
    """OpenWebText, as one datasets.Dataset with a column `text`, and no remark."""
    from kronygpt.hub import hub_dataset

    try:
        try:
            whole = hub_dataset(OPENWEBTEXT)
        except RuntimeError:  # as in hub_rows
            whole = hub_dataset(OPENWEBTEXT, revision=PARQUET)
    except (OSError, ValueError) as error:
        raise OSError(f"cannot load {OPENWEBTEXT} ({type(error).__name__}); {NO_NETWORK}") from None
    yield whole, ""


def encode_all(batches, tokenizer, pool):
    """The tokens of all documents in order, in lists of DOCUMENTS_PER_TASK of them; while the threads of the pool
    tokenize a batch, the next one is read."""
    begun = ()
    for batch in batches:
        texts = batch["text"]
        pieces = [texts[i:i + DOCUMENTS_PER_TASK] for i in range(0, len(texts), DOCUMENTS_PER_TASK)]
        ahead = pool.map(lambda piece: [tokenizer.encode(text) for text in piece], pieces)
        yield from begun
        begun = ahead
    yield from begun


def write(dataset, ours, dataset_writer):
    """Split a datasets.Dataset with a column `text` and tokenize it into a DatasetWriter."""
    from tqdm import tqdm

    parts = dataset.train_test_split(test_size=val_fraction, seed=seed, shuffle=True)
    with dataset_writer as writer, ThreadPoolExecutor(threads) as pool:
        for split, part in (("val", parts["test"]), ("train", parts["train"])):
            batches = part.select_columns("text").iter(DOCUMENTS_AT_ONCE)
            with tqdm(total=len(part), desc=f"tokenizing {split}", unit="doc", unit_scale=True) as progress:
                for piece in encode_all(batches, ours, pool):
                    for tokens in piece:
                        writer.add(split, tokens)
                    progress.update(len(piece))


def main():
    from kronygpt.data import DatasetWriter
    from kronygpt.tokenizer import GPT2Tokenizer, read_tokenizer

    check_range(globals(), "val_fraction", above=0, below=1)
    check_range(globals(), "seed", at_least=0)
    check_range(globals(), "threads documents", at_least=1, at_most=10**9)
    check_choice(globals(), "sample_by", "line", "paragraph", "document")
    if separator == "":
        raise UserError("--separator is a text, not nothing")
    if hub and (data_files or documents is None):
        raise UserError("--hub goes with --documents=N, the number to stream, and without --data_files")
    if data_files is not None:
        source, files = data_files, find_files()
        texts = (text for file in files for text in read_documents(file))
    else:
        texts = hub_texts(hub or OPENWEBTEXT)
        source = ", ".join(filter(None, [hub or OPENWEBTEXT, hub_config]))
    if documents:
        source += f", the first {documents:,} documents"
    ours = read_tokenizer(tokenizer) if tokenizer else GPT2Tokenizer()
    ours.encode("")  # which says what is wrong with it now
    is_whole = data_files is None and documents is None
    with openwebtext() if is_whole else gathered(texts) as (dataset, remark):
        if len(dataset) < 2:
            raise UserError(f"too few documents to hold one out: {len(dataset)}; --sample_by=line makes more of a .txt")
        if math.ceil(val_fraction * len(dataset)) >= len(dataset):
            raise UserError(f"--val_fraction={val_fraction} leaves none of {len(dataset):,} documents for training")
        start = time.perf_counter()
        writer = DatasetWriter(out or (Path(hub).name if hub else "openwebtext"), ours, source)
        write(dataset, ours, writer)
        print(f"{writer.report}\ntokenized {len(dataset):,} documents in {time.perf_counter() - start:.1f} s{remark}")


if __name__ == "__main__":
    run(main)
