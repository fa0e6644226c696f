"""sample.py beside a plain loop over transformers' GPT-2."""
import pytest
import torch
from conftest import run_here
from transformers import GPT2LMHeadModel

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
    said = run_here("sample.py", talker, f"--start={PROMPT}", "--max_new_tokens=40", *options)
    assert said.returncode == 0, said.stderr
    return said.stdout.split("\n", 1)[1]


@pytest.mark.parametrize("option", ["--temperature=0", "--top_k=1"])
def test_the_likeliest_token_is_that_of_transformers(option, talker, greedy):
    assert sample(talker, option) == greedy


def test_a_seed_gives_one_text(talker):
    first = sample(talker, "--seed=1")
    torch.manual_seed(99)  # what the global generator has done before is of no account
    assert sample(talker, "--seed=1") == first
    assert sample(talker, "--seed=2") != first


def test_samples_differ_and_each_begins_with_the_prompt(talker):
    *samples, rest = sample(talker, "--num_samples=3", "--temperature=1", "--top_k=0").split(LINE)
    assert len(set(samples)) == 3 and rest == ""
    assert all(text.startswith(PROMPT) for text in samples)


def test_a_low_temperature_is_nearly_greedy(talker, greedy):
    assert sample(talker, "--temperature=1e-6") == greedy


def test_the_prompt_may_come_from_a_file(talker, workdir, greedy):
    workdir.joinpath("prompt.txt").write_text(PROMPT, encoding="utf-8")
    assert sample(talker, "--start=FILE:prompt.txt", "--temperature=0") == greedy


def test_an_empty_prompt_is_a_line_end(talker):
    assert sample(talker, "--start=", "--seed=5") == sample(talker, "--start=\n", "--seed=5")


def test_end_of_text_in_a_prompt_is_the_token(talker):
    """As in nanoGPT's sample.py; of bytes, it is the line end."""
    assert sample(talker, "--start=<|endoftext|>", "--seed=5") == sample(talker, "--start=\n", "--seed=5")
    assert sample(talker, "--start=a<|endoftext|>b", "--seed=5") == sample(talker, "--start=a\nb", "--seed=5")


def test_a_byte_order_mark_is_not_of_the_prompt(talker, workdir, greedy):
    workdir.joinpath("prompt.txt").write_text("\ufeff" + PROMPT, encoding="utf-8")
    assert sample(talker, "--start=FILE:prompt.txt", "--temperature=0") == greedy


@pytest.mark.parametrize("option, message", [
    ("--start=FILE:nothing.txt", "nothing.txt"),
    ("--temperature=-1", "--temperature is at least 0"),
    ("--num_samples=0", "at least 1"),
    ("--max_new_tokens=0", "at least 1"),
    ("--temperature=1e-50", "--temperature is 0 or at least 1e-06, not 1e-50"),
    ("--start=FILE:.", ". is no regular file"),
    ("--temperature=hot", "--temperature takes a number"),
    ("--dtype=int8", "dtype is float32"),
    ("--device=abacus", "there is no device 'abacus'"),
])
def test_wrong_options_get_one_line(option, message, gpt2_dir, workdir):
    said = run_here("sample.py", gpt2_dir, option)
    assert said.returncode == 2
    assert message in said.stderr and said.stderr.count("\n") == 1
