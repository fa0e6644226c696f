"""Tokenize OpenWebText, or your own text, with GPT-2's BPE into data/<out>/{train,val}.bin.

    python prepare_owt.py                                           # OpenWebText, 17 GB of tokens
    python prepare_owt.py --data_files='books/*.txt' --out=books    # local .txt, .jsonl or .parquet, with a `text` column

The split and the tokens are those of nanoGPT's data/openwebtext/prepare.py: one document in 2000 is held out, seed
2357, an end-of-text token after each document. The other scripts take the data set by its name, `--dataset=<out>`.
"""
import glob
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from configurator import UserError, check_range, run

out = "openwebtext"  # name of the data set, a directory under data/
data_files: str | None = None  # glob of local .txt, .jsonl or .parquet files; default: OpenWebText
sample_by = "paragraph"  # a document in a .txt file: line, paragraph (between blank lines) or document (the file)
val_fraction = 0.0005  # share of the documents in the validation split
seed = 2357  # of the split
threads = os.cpu_count() or 1  # tokenizer threads

HUB_NAME = "Skylion007/openwebtext"
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
DOCUMENTS_AT_ONCE = 2000  # read and tokenized together: bounds the memory
DOCUMENTS_PER_TASK = 100  # in a thread's task: with one each, several threads are no faster than one


def find_files():
    """The local files that data_files names, which are all of one kind."""
    files = sorted(glob.glob(data_files, recursive=True))
    if not files:
        raise UserError(f"no files match --data_files={data_files}")
    kinds = {Path(file).suffix for file in files}
    if len(kinds) > 1 or not kinds <= BUILDERS.keys():
        raise UserError(f"--data_files={data_files} matches {', '.join(sorted(kinds))}: "
                         f"give files of one kind, of {', '.join(BUILDERS)}")
    return files


def load_documents(files):
    """The documents of local files, or of OpenWebText without any, as one datasets.Dataset with a column `text`.

    Raises:
        UserError: the local files are damaged or have no such column.
        OSError: OpenWebText could not be downloaded.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not files:
        try:
            return load_dataset(HUB_NAME, split="train")
        except RuntimeError:  # the repository still holds a script, which datasets 4 and later refuses
            return load_dataset(HUB_NAME, split="train", revision="refs/convert/parquet")
    builder = BUILDERS[Path(files[0]).suffix]
    options = dict(sample_by=sample_by) if builder == "text" else {}
    try:
        documents = load_dataset(builder, data_files=files, split="train", **options)
    except DatasetGenerationError as error:
        raise UserError(f"cannot read --data_files={data_files} as UTF-8 {builder}: {error.__cause__ or error}") from None
    if "text" not in documents.column_names:
        raise UserError(f"--data_files={data_files} has the columns {', '.join(documents.column_names)}, and no `text`")
    return documents


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


def main():
    from tqdm import tqdm

    from data import DatasetWriter, GPT2Tokenizer

    check_range(globals(), "val_fraction", above=0, below=1)
    check_range(globals(), "threads", at_least=1)
    files = find_files() if data_files is not None else []
    tokenizer = GPT2Tokenizer()
    documents = load_documents(files)
    if len(documents) < 2:
        raise UserError(f"too few documents to hold one out: {len(documents)}; --sample_by=line makes more of a .txt")
    parts = documents.train_test_split(test_size=val_fraction, seed=seed, shuffle=True)
    start = time.perf_counter()
    with DatasetWriter(out, tokenizer, source=data_files or HUB_NAME) as writer, ThreadPoolExecutor(threads) as pool:
        for split, part in (("val", parts["test"]), ("train", parts["train"])):
            batches = part.select_columns("text").iter(DOCUMENTS_AT_ONCE)
            with tqdm(total=len(part), desc=f"tokenizing {split}", unit="doc", unit_scale=True) as progress:
                for piece in encode_all(batches, tokenizer, pool):
                    for tokens in piece:
                        writer.add(split, tokens)
                    progress.update(len(piece))
    print(f"tokenized {len(documents):,} documents in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run(main)
