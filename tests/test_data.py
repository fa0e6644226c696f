"""Batches, .bin files, tokenizers, and the scripts that make data sets."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_here, snapshot, succeed

from experiments import prepare_pydocs
from kronygpt import data
from kronygpt.configurator import UserError
from kronygpt.data import batch_starts, load_meta, load_tokens, mean_loss, score, windows, write_documents
from kronygpt.tokenizer import BytesTokenizer, GPT2Tokenizer
from model import KronyGPTConfig

META = dict(vocab_size=256, tokenizer="bytes")
TEXTS = [f"Document {i}: " + "a few words, and naïve café 文字. " * (i % 7 + 1) for i in range(60)]
TEXTS[7] = "A special token in a text, <|endoftext|>, is plain text."


def write_dataset(name, train, val=b"", meta=META):
    """data/<name>/ with these tokens, or bytes of the files, and this meta.json (a dict, text, or None for no file)."""
    directory = data.DATA_DIR / name
    directory.mkdir(parents=True)
    for split, tokens in (("train", train), ("val", val)):
        content = tokens if isinstance(tokens, bytes) else np.array(tokens, dtype="<u2").tobytes()
        directory.joinpath(f"{split}.bin").write_bytes(content)
    if meta is not None:
        directory.joinpath("meta.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    return directory


def config_of(vocab_size, tokenizer=None):
    """The config of a model with this vocabulary, and perhaps the record of its tokenizer."""
    return KronyGPTConfig(block_size=32, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=8, tokenizer=tokenizer)


def read_bin(path):
    return np.fromfile(path, dtype="<u2")


def test_the_batch_of_a_step_is_a_function_of_seed_and_step():
    steps = {step: batch_starts(1000, 10, 1, step, 64) for step in range(50)}
    for step in 49, 3, 0, 27:  # in any order, as a resumed run asks for them
        assert np.array_equal(batch_starts(1000, 10, 1, step, 64), steps[step])
    assert len({tuple(starts) for starts in steps.values()}) == 50
    assert not np.array_equal(batch_starts(1000, 10, 2, 0, 64), steps[0])


def test_windows_begin_everywhere_that_a_block_and_its_last_target_fit():
    starts = np.concatenate([batch_starts(20, 12, 0, step, 100) for step in range(20)])
    values, counts = np.unique(starts, return_counts=True)
    assert values.tolist() == list(range(8))  # the last window is tokens 7 to 19
    assert counts.min() > 150  # of 250 expected


def test_tokens_beyond_the_vocabulary_are_an_error_that_names_the_place(workdir):
    write_dataset("a", [1, 2, 3, 256, 5, 6])
    tokens = load_tokens("a", "train", config_of(257, dict(name="bytes")))
    assert tokens.tolist() == [1, 2, 3, 256, 5, 6] and windows(tokens, [0], 2, 256)[1].tolist() == [[2, 3]]
    with pytest.raises(UserError, match=r"token 256 in .*train.bin, position 3: .* ends at 255"):
        load_tokens("a", "train", config_of(256))
    for starts in [1], [0, 2]:  # as a target, and as an input
        with pytest.raises(UserError, match=r"token 256 in .*train.bin, position 3: .* ends at 255"):
            windows(tokens, starts, 2, 256)


def test_a_bin_file_shorter_than_a_block_is_an_error(workdir):
    write_dataset("a", range(9), b"")
    assert len(load_tokens("a", "train", config_of(256), block_size=8)) == 9
    with pytest.raises(UserError, match=r"train.bin has 9 tokens, and a block takes 10"):
        load_tokens("a", "train", config_of(256), block_size=9)
    with pytest.raises(UserError, match=r"val.bin has 0 tokens"):
        load_tokens("a", "val", config_of(256))


@pytest.mark.parametrize("content, message", [
    (np.arange(200, dtype="<u4").tobytes(), "looks like tokens of 32 or 64 bits"),
    (np.arange(60_000, 70_000, dtype="<u4").tobytes(), "looks like tokens of 32"),  # of a vocabulary beyond 65,536
    (np.arange(200, dtype="<i8").tobytes(), "looks like tokens of 32 or 64 bits"),
    (np.array([20240520, 1, 200] + [0] * 253, "<i4").tobytes() + bytes(range(200)), "looks like .* llm.c's"),
])
def test_a_bin_file_of_another_format_is_a_line_that_names_it(workdir, content, message):
    write_dataset("a", content, meta=dict(vocab_size=50257, tokenizer="gpt2"))
    with pytest.raises(UserError, match=rf"train\.bin {message}"):
        load_tokens("a", "train", config_of(50257))


@pytest.mark.parametrize("tokens", [
    np.zeros(500), np.full(500, 65), np.arange(500) % 2, np.arange(500) % 4, np.arange(500) % 256, np.arange(500) * 100,
    [65, 0] * 20 + [65, 9], np.random.default_rng(0).integers(50257, size=9999)])
def test_plain_tokens_are_no_other_format(workdir, tokens):
    write_dataset("a", np.array(tokens).astype(np.uint16), meta=dict(vocab_size=50257, tokenizer="gpt2"))
    assert load_tokens("a", "train", config_of(50257)).tolist() == np.array(tokens).tolist()


def test_a_missing_data_set_names_the_command_that_makes_it(workdir):
    for name, command in ("openwebtext", "python prepare_owt.py"), ("pydocs", "python -m experiments.prepare_pydocs"), \
            ("books", "python prepare_owt.py --data_files=.* --out=books"):
        with pytest.raises(FileNotFoundError, match=f"no data set in data/{name}; make it with: {command}"):
            load_tokens(name, "train", config_of(256))
    (write_dataset("a", range(9)) / "val.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data/a/val\.bin"):
        load_tokens("a", "val", config_of(256))


def test_a_directory_of_nanogpt_holds_gpt2_tokens(workdir):
    write_dataset("a", [50256, 11, 0], meta=None)
    assert load_meta("a") == dict(vocab_size=50257, tokenizer="gpt2", tokens={})
    for vocab_size in 50257, 50304:  # nanoGPT pads the vocabulary to a multiple of 64
        assert load_tokens("a", "train", config_of(vocab_size)).tolist() == [50256, 11, 0]


def test_tokens_of_a_padded_vocabulary_are_no_text(shared):
    tokenizer = GPT2Tokenizer()
    assert tokenizer.decode([*tokenizer.encode("text").tolist(), 50300]) == "text"


def test_a_written_data_set_is_documents_with_an_end_after_each(workdir):
    encode = BytesTokenizer().encode
    write_documents(data.DATA_DIR / "a", BytesTokenizer(), "a test", dict(
        val=[encode("two")], train=map(encode, ["one", "", "three"])))
    assert snapshot(workdir / "data" / "a").keys() == {"train.bin", "val.bin", "meta.json"}
    assert bytes(read_bin("data/a/train.bin").tolist()) == b"one\n\nthree\n"
    assert bytes(read_bin("data/a/val.bin").tolist()) == b"two\n"
    assert load_meta("a") == dict(META, tokens=dict(train=11, val=4), documents=dict(train=3, val=1), source="a test")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_preparation_leaves_the_data_set_as_it_was(workdir, error):
    def documents():
        yield np.arange(9, dtype=np.uint16)
        raise error

    before = snapshot(write_dataset("a", range(9), range(3)))
    with pytest.raises(error):
        write_documents(data.DATA_DIR / "a", BytesTokenizer(), "", dict(train=documents()))
    assert snapshot(workdir / "data" / "a") == before


def test_score_is_the_loss_of_each_window(small_model, workdir):
    tokens, starts = np.random.default_rng(0).integers(256, size=500).astype(np.uint16), data.even_starts(500, 20, 7)
    with torch.no_grad():
        x, y = windows(tokens, starts, 20, 256)
        losses = torch.nn.functional.cross_entropy(small_model(x).transpose(1, 2), y, reduction="none")  # (7, 20)
    places = [(s, s + 1, s + 21) for s in starts]
    for batch_size in 1, 3, 100:
        assert mean_loss(small_model, tokens, places, batch_size) == pytest.approx(losses.mean().item(), rel=1e-6)
    so_far = list(score(small_model, tokens, [(s, s + 5, s + 8 + i) for i, s in enumerate(starts)], 2))
    expected = sum(losses[i, 4:7 + i].sum().item() for i in range(7))  # windows of several lengths, in 4 batches
    assert len(so_far) == 4 and so_far[-1] == (pytest.approx(expected, rel=1e-6), sum(range(3, 10)))
    tokens[40] = 256
    with pytest.raises(UserError, match="token 256 in the data, position 40"):
        mean_loss(small_model, tokens, [(0, 1, 20), (30, 31, 50)], 2)


def test_prepare_pydocs_holds_out_documents_the_same_way_every_time(workdir, run_script, monkeypatch):
    texts = prepare_pydocs.documents()
    monkeypatch.setattr(prepare_pydocs, "documents", lambda: list(texts))
    prepare_pydocs.main()
    result = run_script("experiments/prepare_pydocs.py", "--out=there", cwd=workdir, env={"PYTHONHASHSEED": "1"})
    assert result.returncode == 0, result.stderr
    assert snapshot(workdir / "data" / "pydocs") == snapshot(workdir / "data" / "there")
    meta, n_val = load_meta("there"), round(0.05 * len(texts))
    assert meta["documents"] == dict(train=len(texts) - n_val, val=n_val)
    train, val = (bytes(read_bin(f"data/there/{split}.bin").tolist()) for split in ("train", "val"))
    assert len(train) + len(val) == sum(len(text.encode()) + 1 for text in texts) > 10**6
    held_out = [i for i, text in enumerate(texts) if text.encode() + b"\n" not in train]
    assert n_val - 3 <= len(held_out) <= n_val  # a short document may stand within another
    assert max(held_out) - min(held_out) > len(texts) / 2  # from everywhere: shuffled


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_prepare_owt_writes_the_tokens_that_nanogpt_does(workdir, run_script, shared, kind):
    import tiktoken
    from datasets import Dataset

    for name, texts in ("a", TEXTS[:25]), ("b", TEXTS[25:]):
        rows, path = Dataset.from_dict({"text": texts, "url": ["u"] * len(texts)}), workdir / f"{name}.{kind}"
        if kind == "txt":
            path.write_text("\n\n".join(texts), encoding="utf-8")
        else:
            rows.to_json(path) if kind == "jsonl" else rows.to_parquet(path)
    no_home = dict.fromkeys(("HOME", "HF_HOME", "HF_DATASETS_CACHE", "TMPDIR"), "/dev/null/none")
    options = "--out=mine", f"--data_files=*.{kind}", "--val_fraction=0.1"
    result = run_script("prepare_owt.py", *options, cwd=workdir, env=no_home)
    assert result.returncode == 0, result.stderr

    encoding = tiktoken.get_encoding("gpt2")
    parts = Dataset.from_dict({"text": TEXTS}).train_test_split(test_size=0.1, seed=2357, shuffle=True)
    for split, part in ("train", "train"), ("val", "test"):
        tokens = [token for text in parts[part]["text"] for token in [*encoding.encode_ordinary(text), encoding.eot_token]]
        assert read_bin(f"data/mine/{split}.bin").tolist() == tokens
    meta = load_meta("mine")
    assert (meta["vocab_size"], meta["tokenizer"], meta["documents"]) == (50257, "gpt2", dict(train=54, val=6))
    assert snapshot(workdir / "data" / "mine").keys() == {"train.bin", "val.bin", "meta.json"}


def test_prepare_owt_that_fails_says_why_in_a_line_and_changes_nothing(shared, workdir):
    before = snapshot(write_dataset("mine", range(9)))
    (workdir / "other.jsonl").write_text('{"title": "a"}\n{"title": "b"}\n')
    (workdir / "one.txt").write_text("only one")
    (workdir / "latin.txt").write_bytes("déjà\n\nvu".encode("latin-1"))
    for pattern, message in ("nothing/*.txt", "no files match --data_files=nothing/*.txt"), \
            ("other.*", "other.jsonl, row 1 has no text in a column `text` (columns: title)"), \
            ("one.*", "1 documents are too few to split"), ("latin.txt", "cannot read latin.txt: UnicodeDecodeError"):
        result = run_here("prepare_owt.py", "--out=mine", f"--data_files={pattern}")
        assert result.returncode and message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
        assert snapshot(workdir / "data" / "mine") == before


def test_what_a_killed_preparation_leaves_is_cleared_by_the_next(workdir, shared):
    scratch = workdir / "data" / "mine" / ".scratch"
    scratch.mkdir(parents=True)
    for left in scratch / "documents.arrow", scratch / ".lock":
        left.write_text("left")
    Path("few.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    succeed("prepare_owt.py", "--out=mine", "--data_files=few.txt")
    assert snapshot(scratch.parent).keys() == {"train.bin", "val.bin", "meta.json"}
