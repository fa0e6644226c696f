"""The tokenizer beside a model, from its directory to the text that is scored, sampled, prepared and exported."""
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import continuation, refused, succeed
from test_data import config_of, write_dataset
from test_perplexity import measure

from kronygpt import checkpoint
from kronygpt.configurator import UserError
from kronygpt.data import data_tokenizer, load_tokens
from kronygpt.export import gpt2_files
from kronygpt.tokenizer import (
    END_OF_TEXT,
    BytesTokenizer,
    GPT2Tokenizer,
    HuggingFaceTokenizer,
    bytes_to_unicode,
    fingerprint,
    open_tokenizer,
    read_tokenizer,
    tokenizer_record,
)
from model import KronyGPT, KronyGPTConfig

TEXT = "Das ist ein Satz über naïve Wörter; der nächste ist länger als der erste.\n" * 40
MARK = "<|satz|>"


@pytest.fixture
def german(workdir):
    """A directory of a small byte-level BPE, as transformers writes it, and what the tokenizers package makes of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=[MARK], show_progress=False,
                                                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    Path("german").mkdir()
    made.save("german/tokenizer.json")
    settings = dict(eos_token=dict(content=MARK), auto_map=dict(AutoTokenizer=["evil.T", "evil.T"]))
    Path("german/tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return made


def model_of(vocab_size):
    torch.manual_seed(0)
    return KronyGPT(KronyGPTConfig(block_size=32, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=64)).eval()


def write_model(directory, vocab_size):
    """A Hugging Face model, into the directory of its tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=1, n_positions=32, vocab_size=vocab_size,
                                       initializer_range=0.2)).eval()
    model.save_pretrained(directory)
    return model


def write_gpt2(directory, added=()):
    """GPT-2's vocab.json and merges.txt, perhaps with added tokens behind it."""
    Path(directory).mkdir()
    for name, content in gpt2_files().items():
        Path(directory, name).write_bytes(content)
    if added:
        Path(directory, "added_tokens.json").write_text(
            json.dumps({t: i for i, t in enumerate(added, 50257)}), encoding="utf-8")


def test_gpt2_is_told_by_its_files_without_tiktokens(shared, workdir, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers

    write_gpt2("english")
    vocabulary = json.loads(Path("english/vocab.json").read_text(encoding="utf-8"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(workdir))
    assert isinstance(read_tokenizer("english"), GPT2Tokenizer) and tokenizer_record("english") is None
    other = Tokenizer(models.BPE.from_file("english/vocab.json", "english/merges.txt"))  # but each digit by itself
    other.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False)])
    Path("digits").mkdir()
    other.save("digits/tokenizer.json")
    assert read_tokenizer("digits").encode("1234").tolist() == other.encode("1234").ids != other.encode("12").ids
    vocabulary["Ġthe"], vocabulary["Ġof"] = vocabulary["Ġof"], vocabulary["Ġthe"]  # the same tokens under other ids
    Path("english/vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    assert tokenizer_record("english")["name"].startswith("english-")


def test_a_tokenizer_with_further_tokens_is_another_one(shared, workdir):
    write_gpt2("chat", added=["[PAD]", "<|im_start|>"])
    write_dataset("english", range(100), meta=None)
    assert tokenizer_record("chat")["name"].startswith("chat-") and read_tokenizer("chat").vocab_size == 50259
    with pytest.raises(UserError, match="use data and a model that belong together"):
        load_tokens("english", "train", config_of(50259, tokenizer_record("chat")))


def test_a_tokenizer_is_read_as_the_package_reads_it(german):
    ours = read_tokenizer("german")
    assert isinstance(ours, HuggingFaceTokenizer) and ours.name == f"german-{fingerprint(german.get_vocab())}"
    assert ours.vocab_size == 300 and ours.end_of_text == german.token_to_id(MARK)
    for text in TEXT, "", "🙂 \0\r\n\ufeff", "Ġ Ċ":
        tokens = ours.encode(text)
        assert tokens.dtype == np.uint16 and tokens.tolist() == german.encode(text, add_special_tokens=False).ids
        assert ours.decode(tokens) == text and ours.decode_bytes(tokens) == text.encode()


def test_special_tokens_in_a_text_are_plain_text_and_in_a_prompt_the_token(german):
    ours = read_tokenizer("german")
    assert ours.end_of_text not in ours.encode(f"a{MARK}b") and ours.decode(ours.encode(f"a{MARK}b")) == f"a{MARK}b"
    for mark in MARK, END_OF_TEXT:
        assert ours.encode_prompt(f"a{mark}b") == [*ours.encode("a"), ours.end_of_text, *ours.encode("b")]


def test_the_older_form_of_files_is_read_too(german):
    """vocab.json, merges.txt and added_tokens.json."""
    Path("older").mkdir()
    german.model.save("older")
    vocabulary = json.loads(Path("older/vocab.json").read_text(encoding="utf-8"))
    del vocabulary[MARK]
    vocabulary = {token: number - 1 for token, number in vocabulary.items()}
    Path("older/vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    Path("older/added_tokens.json").write_text(json.dumps({MARK: len(vocabulary)}), encoding="utf-8")
    ours = read_tokenizer("older")
    assert ours.vocab_size == 300 and ours.decode_bytes([299]) == MARK.encode()
    assert (ours.encode(TEXT) + 1).tolist() == german.encode(TEXT).ids and ours.decode(ours.encode(TEXT)) == TEXT


def test_truncation_and_padding_of_a_directory_are_not_for_whole_texts(german):
    german.enable_truncation(8)
    german.enable_padding(length=5000)
    german.save("german/tokenizer.json")
    german.no_truncation()
    german.no_padding()
    assert read_tokenizer("german").encode(TEXT).tolist() == german.encode(TEXT).ids


def test_our_bytes_are_told_but_not_where_text_is_changed_first(workdir):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    made = Tokenizer(models.BPE({character: byte for byte, character in bytes_to_unicode().items()}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    Path("small").mkdir()
    made.save("small/tokenizer.json")
    assert isinstance(read_tokenizer("small"), BytesTokenizer) and tokenizer_record("small") is None
    made.normalizer = normalizers.Lowercase()
    made.save("small/tokenizer.json")
    assert read_tokenizer("small").encode("AB").tolist() == [ord("a"), ord("b")]


@pytest.mark.parametrize("files, message", [
    ({"tokenizer.json": "{"}, "cannot read the tokenizer in"),
    ({"tokenizer.json": '{"model": {"vocab": {"a": 1}}}'}, "cannot read the tokenizer in"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "", "added_tokens.json": '{"b": 5}'}, "numbers in added_tokens.json"),
    ({"vocab.txt": "[PAD]\n"}, r"in a form that is not read here \(vocab\.txt\)"),
    ({"vocab.json": '{"a": 1}'}, r"in a form that is not read here \(vocab\.json\)"),
    ({"spiece.model": "\x0a"}, r"in a form that is not read here \(spiece\.model\)"),
])
def test_what_cannot_be_read_is_one_line(files, message, workdir):
    for name, content in files.items():
        workdir.joinpath(name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_tokenizer(workdir)
    assert len(str(caught.value).splitlines()) == 1
    assert tokenizer_record(workdir) == dict(name="unknown", path=str(workdir))  # the weights do not need it


def test_a_tokenizer_that_went_or_changed_is_one_line_that_names_the_option(german):
    record = tokenizer_record("german")
    assert record["path"] == str(Path("german").resolve())
    Path("german").rename("deutsch")
    with pytest.raises(UserError, match=f"german has no tokenizer, and the model's is {record['name']}"):
        open_tokenizer(config_of(300, record))
    assert open_tokenizer(config_of(300, record), "deutsch").encode("ist").tolist() == german.encode("ist").ids
    german.add_tokens(["neu"])
    Path("german").mkdir()
    german.save("german/tokenizer.json")
    with pytest.raises(UserError, match=f"german has german-.*, and the model's is {record['name']}"):
        open_tokenizer(config_of(301, record))
    with pytest.raises(UserError, match="nothing has no tokenizer"):
        open_tokenizer(config_of(300, record), "nothing")


def test_a_model_is_scored_with_its_own_tokenizer(german, workdir):
    """Of the same size as bytes, and so told by nothing but the files beside the model."""
    model, text = write_model("german", 300), TEXT[:60]
    workdir.joinpath("text.txt").write_text(text, encoding="utf-8")
    ids = torch.tensor([german.encode(text).ids])
    expected = model(ids, labels=ids).loss.item()
    for options in [], ["--tokenizer=german"]:
        result = measure("german", "text.txt", *options)["text.txt"]
        assert result["loss"] == pytest.approx(expected, rel=1e-5)
        bits = expected / math.log(2) * ids.numel() / len(text.encode())
        assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_a_model_speaks_with_its_own_tokenizer(german, workdir):
    write_model("german", 300)
    said = succeed("sample.py", "german", "--start=über", "--max_new_tokens=5", "--temperature=0")
    model, _ = checkpoint.load("german")
    ids = continuation(model, torch.tensor([german.encode("über").ids]), 5, temperature=0)[0].tolist()
    assert model.config.tokenizer["name"].startswith("german-")
    assert said.stdout.split("\n", 1)[1].startswith(read_tokenizer("german").decode(ids))


def test_text_is_prepared_with_a_models_tokenizer_and_belongs_to_it(german, workdir):
    workdir.joinpath("text.txt").write_text("\n\n".join(f"{i} {TEXT[:70]}" for i in range(30)), encoding="utf-8")
    succeed("prepare_owt.py", "--data_files=text.txt", "--out=satz", "--tokenizer=german", "--val_fraction=0.1")
    record = tokenizer_record("german")
    meta = json.loads(Path("data/satz/meta.json").read_text(encoding="utf-8"))
    assert (meta["vocab_size"], meta["tokenizer"], meta["tokenizer_path"]) == (300, record["name"], record["path"])
    assert data_tokenizer("satz") == record
    tokens = load_tokens("satz", "train", config_of(300, record))
    assert tokens[-1] == german.token_to_id(MARK) and "Das ist ein Satz" in read_tokenizer("german").decode(tokens[:40])
    for vocab_size, name in (300, "unknown"), (50257, "gpt2"):
        with pytest.raises(UserError, match=f"holds {record['name']} tokens .* of {name} tokens"):
            load_tokens("satz", "train", config_of(vocab_size))
    shutil.copytree("german", "copy")
    assert load_tokens("satz", "train", config_of(300, tokenizer_record("copy"))) is not None  # the same under another name
    write_model("german", 300)
    assert measure("german", "satz")["satz"]["bits_per_byte"] > 0


def test_documents_need_an_end_and_a_tokenizer_without_one_is_a_line(german, workdir):
    Path("german/tokenizer_config.json").write_text("{}", encoding="utf-8")
    Path("empty").mkdir()
    workdir.joinpath("text.txt").write_text("a\n\nb\n\nc")
    for directory in "german", "empty":
        line = refused("prepare_owt.py", "--data_files=text.txt", "--out=satz", f"--tokenizer={directory}")
        assert f"{directory} has no tokenizer with an end-of-text token" in line and not Path("data").exists()


def test_an_export_takes_the_tokenizer_along_as_data(german, workdir):
    from transformers import AutoTokenizer

    write_model("german", 300)
    Path("german/evil.py").write_text("raise SystemExit", encoding="utf-8")
    succeed("kron_to_gpt.py", "german", "exported")
    assert Path("exported/tokenizer.json").read_bytes() == Path("german/tokenizer.json").read_bytes()
    assert "auto_map" not in Path("exported/tokenizer_config.json").read_text(encoding="utf-8")
    assert not Path("exported/evil.py").exists()
    theirs = AutoTokenizer.from_pretrained("exported", trust_remote_code=False)
    assert theirs(TEXT).input_ids == german.encode(TEXT).ids and theirs.eos_token == MARK
    assert json.loads(Path("exported/config.json").read_text(encoding="utf-8"))["eos_token_id"] == german.token_to_id(MARK)
    assert tokenizer_record("exported")["name"].rpartition("-")[2] == tokenizer_record("german")["name"].rpartition("-")[2]


def test_an_export_without_its_tokenizer_has_the_weights_and_a_line(german, workdir):
    write_model("german", 300)
    Path("german/tokenizer.json").unlink()
    Path("german/vocab.txt").write_text("[PAD]", encoding="utf-8")
    said = succeed("kron_to_gpt.py", "german", "exported")
    assert "in a form that is not read here (vocab.txt)" in said.stdout and "only the weights are written" in said.stdout
    assert Path("exported/model.safetensors").exists() and not list(Path("exported").glob("*token*"))


@pytest.mark.parametrize("make", [BytesTokenizer, GPT2Tokenizer, lambda: HuggingFaceTokenizer("german")])
def test_lone_surrogates_are_replaced_as_by_tiktoken(make, shared, german):
    ours = make()
    for text, replaced in ("a\ud83db", "a\ufffdb"), ("\ud83d\ude42", "🙂"), ("x\udc80", "x\ufffd"):
        assert ours.decode(ours.encode(text)) == replaced and ours.encode(text).tolist() == ours.encode(replaced).tolist()
        if isinstance(ours, GPT2Tokenizer):
            assert ours.encode(text).tolist() == ours.encoding.encode(text)


def test_end_of_text_in_a_prompt_is_the_token(shared):
    gpt2 = GPT2Tokenizer()
    for text in END_OF_TEXT, f"a {END_OF_TEXT}\n b", "", f"{END_OF_TEXT}{END_OF_TEXT}":
        assert gpt2.encode_prompt(text) == (gpt2.encoding.encode(text, allowed_special={END_OF_TEXT}) or [50256])
    assert BytesTokenizer().encode_prompt(f"a{END_OF_TEXT}") == [ord("a"), ord("\n")]


# A data set whose tokenizer nobody knows, such as nanoGPT's characters.

class Pickled:
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def test_nanogpts_characters_get_a_line_that_says_what_to_write_and_with_that_they_train(workdir):
    tokens = np.random.default_rng(0).integers(65, size=3000)
    char = write_dataset("char", tokens, tokens[:500], meta=None)
    (char / "meta.pkl").write_bytes(pickle.dumps(Pickled()))
    train = ["train.py", "--dataset=char", "--block_size=16", "--batch_size=2", "--gradient_accumulation_steps=1",
             "--n_layer=1", "--n_head=1", "--n_embd=16", "--max_iters=1", "--eval_iters=1"]
    assert 'write {"vocab_size": N, "tokenizer": "unknown"} into data/char/meta.json' in refused(*train)
    (char / "meta.json").write_text('{"vocab_size": 65, "tokenizer": "unknown"}')
    succeed(*train)
    assert not Path("pwned").exists()
    assert data_tokenizer("char") == dict(name="unknown", path=None)
    checkpoint.save("char.pt", model_of(65))
    result = measure("char.pt", "char")["char"]
    assert result["bits_per_byte"] is None and result["tokens_scored"] == 500 - 16
    for vocab_size in 50257, 256, 66:
        with pytest.raises(UserError, match="holds unknown tokens"):
            load_tokens("char", "train", config_of(vocab_size))


def test_a_model_without_a_tokenizer_takes_no_text(workdir):
    checkpoint.save("char.pt", model_of(65))
    line = refused("sample.py", "char.pt", "--start=to be")
    assert "no tokenizer is known for the vocabulary of 65 (--tokenizer=DIRECTORY names one)" in line
