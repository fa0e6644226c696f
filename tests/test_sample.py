"""sample.py beside a plain loop over transformers' GPT-2."""
import pytest
import torch
from conftest import succeed
from transformers import GPT2LMHeadModel

from kronygpt.tokenizer import BytesTokenizer, GPT2Tokenizer, stream_text

PROMPT = "Hä?"
LINE = "\n" + "-" * 80 + "\n"


@pytest.fixture(scope="module")
def talker(gpt2_dir, tmp_path_factory):
    """A random GPT-2 whose next token hangs on all those before it, and is ASCII."""
    model = GPT2LMHeadModel.from_pretrained(gpt2_dir)
    with torch.no_grad():
        model.transformer.wte.weight[128:] = 0
        for p in model.transformer.h.parameters():
            p *= 10 if p.dim() == 2 else 1
    directory = tmp_path_factory.mktemp("talker")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def greedy(talker):
    """The prompt and 40 bytes, each the likeliest one behind the last 32."""
    model, tokens = GPT2LMHeadModel.from_pretrained(talker).eval(), list(PROMPT.encode())
    with torch.no_grad():
        for _ in range(40):
            tokens.append(model(torch.tensor([tokens[-32:]])).logits[0, -1].argmax().item())
    return bytes(tokens).decode() + LINE


def sample(talker, *options):
    """What is printed behind the line of options."""
    said = succeed("sample.py", talker, f"--start={PROMPT}", "--max_new_tokens=40", *options)
    return said.stdout.split("\n", 1)[1]


@pytest.mark.parametrize("option", ["--temperature=0", "--top_k=1"])
def test_the_likeliest_token_is_that_of_transformers(option, talker, greedy):
    assert sample(talker, option) == greedy


def test_a_seed_gives_one_text_and_samples_differ(talker):
    first = sample(talker, "--seed=1")
    torch.manual_seed(99)  # what the global generator has done before is of no account
    assert sample(talker, "--seed=1") == first
    assert sample(talker, "--seed=2") != first
    *samples, rest = sample(talker, "--num_samples=3", "--temperature=1", "--top_k=0").split(LINE)
    assert len(set(samples)) == 3 and rest == ""
    assert all(text.startswith(PROMPT) for text in samples)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_prompt_may_come_from_a_file(mark, talker, workdir, greedy):
    workdir.joinpath("prompt.txt").write_text(mark + PROMPT, encoding="utf-8")
    assert sample(talker, "--start=FILE:prompt.txt", "--temperature=0") == greedy


@pytest.mark.parametrize("text", ["plain", "Hä? 日本 🦜!", "🦜"])
def test_streamed_text_comes_in_whole_characters(text):
    tokens = BytesTokenizer().encode("?" + text).tolist()
    pieces = list(stream_text(BytesTokenizer(), iter(tokens[1:]), last=tokens[0]))
    whole = [piece for character in text for piece in ["", "", "", character][-len(character.encode()):]]
    assert pieces == whole  # each when its last byte is here
    for cut in range(1, len(tokens)):  # also of incomplete characters
        pieces = list(stream_text(BytesTokenizer(), tokens[1:cut], last=tokens[0]))
        assert "".join(pieces) == BytesTokenizer().decode(tokens[:cut])[1:]


def test_streamed_words_are_those_of_the_whole_text(shared):
    tokenizer = GPT2Tokenizer()
    tokens = tokenizer.encode("It costs 3 € – “naïve” 🦜🦜, isn't it?\n\tYes.").tolist()
    pieces = list(stream_text(tokenizer, tokens[1:], tokens[0]))
    assert tokenizer.decode(tokens[:1]) + "".join(pieces) == tokenizer.decode(tokens)
    assert len(pieces) == len(tokens) - 1 and sum(piece == "" for piece in pieces) > 2
