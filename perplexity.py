"""Perplexity of a model on a data set.

    python perplexity.py ckpt wiki103           # wiki103, wiki2 or lambada; all three without a name
    python perplexity.py ckpt owt 200           # 200 batches of data/openwebtext/val.bin
    python perplexity.py ckpt pydocs            # the validation split of a data set under data/
    python perplexity.py ckpt book.txt          # a file: UTF-8 text, or .jsonl, .json or .parquet with a `text` in each row

ckpt is a .pt file, a Hugging Face directory, a name under models/ or a hub name; a .pt is scored as it is. Rows of a
data set are joined by blank lines. The text is cut into windows of the model's context, one every --stride tokens
(default: no overlap), and each window scores the tokens that no earlier window has scored. The first token of a window has
no context and is not scored in that window. Perplexity is exp of the mean loss over the tokens scored; bits per byte
divides the same loss by the text's bytes. A text is tokenized with the model's own tokenizer.

lm_eval (EleutherAI's evaluation harness) differs, so its figures are not comparable with these:
- wikitext: it detokenizes WikiText-2's test pages, scores each page by itself, its first token after the end of text
  included, and divides by words (word_perplexity) or bytes of the original page. Here the rows are scored as they are, as
  one text, per token. Its windows carry one token of context, and the last one of a page a full context.
- lambada_openai: it scores the last word of each passage alone, by perplexity per word and by accuracy, on OpenAI's version
  of the data. Here every token of all passages is scored, as one text.
"""
import json
import math
import re
import sys
import time
from pathlib import Path

from kronygpt.configurator import UserError, check_range, run
from kronygpt.data import ROWS, read_rows
from kronygpt.files import atomic_write, check_is_file

stride: int | None = None  # tokens between the starts of two windows; default: the model's context
wikitext = "Salesforce/wikitext"  # hub name, or a local directory with the same layout
lambada = "cimec/lambada"  # hub name, or a local .jsonl
tokenizer: str | None = None  # directory of the tokenizer; default: the model's
batch_size = 4  # windows in a batch
device = ""  # cuda, cpu, ...; default: CUDA if available, else the CPU
dtype = "float32"  # bfloat16 or float16, by autocast
json_out: str | None = None  # file for the results as JSON

PUBLISHED = ("wiki103", "wiki2", "lambada")
OWT_BATCHES = 200
LARGEST_LOSS = math.log(sys.float_info.max)  # nats per token whose exp is a number


def is_text(name):
    """Whether a data set is text, and no .bin of tokens: a published one or a file."""
    from kronygpt.data import DATA_DIR

    if name in PUBLISHED or name.lower().endswith((".txt", *ROWS)):
        return True
    if name.endswith((".bin", ".pt", ".npy", ".safetensors")) and Path(name).is_file():
        raise UserError(f"{name} is no text: of a data set, name its directory under data/")
    return Path(name).is_file() and not (DATA_DIR / name).is_dir()


def load_rows(name):
    """The texts of a data set, None for a row without one: wiki103, wiki2, lambada, or the path of a file."""
    from kronygpt.hub import hub_dataset

    path, config = {"wiki103": (wikitext, "wikitext-103-v1"), "wiki2": (wikitext, "wikitext-2-v1"),
                    "lambada": (lambada, None)}.get(name, (name, None))
    if name not in PUBLISHED or Path(path).is_file() or path.endswith((".txt", *ROWS)):
        return list(read_rows(path))
    try:
        if Path(path).is_dir():
            files = sorted(Path(path, config or "").glob("test-*.parquet"))
            if not files:
                raise FileNotFoundError(f"no test-*.parquet in {Path(path, config or '')}")
            return [row for file in files for row in read_rows(file)]
        return hub_dataset(path, config, split="test")["text"]
    except (OSError, ValueError) as error:
        local = "--wikitext=DIRECTORY" if name != "lambada" else "--lambada=FILE.jsonl"
        raise OSError(f"cannot load {name} from {path} ({type(error).__name__}); "
                      f"with no network, {local} reads a local copy") from None


def load_text_tokens(name, config, directory=None):
    """The tokens of a text data set, and its length in bytes.

    Args:
        name: of the data set.
        config: the KronyGPTConfig of the model.
        directory: of another tokenizer than the model's, or None.
    """
    from kronygpt.data import check_tokens
    from kronygpt.tokenizer import open_tokenizer, well_formed

    rows = list(load_rows(name))
    texts = [row for row in rows if row is not None]
    if len(texts) < len(rows):
        print(f"{name}: {len(rows) - len(texts):,} rows with a null for a text are skipped")
    text = well_formed("\n\n".join(texts))
    tokens = open_tokenizer(config, directory).encode(text)
    check_tokens(tokens, config.vocab_size)
    return tokens, len(text.encode())


def load_bin_tokens(name, n_windows, config):
    """The tokens of data/<name>/val.bin, or the first n_windows contexts of them, and their length in bytes, None where
    nobody knows their text."""
    from kronygpt.data import check_tokens, load_tokens
    from kronygpt.tokenizer import open_tokenizer

    tokens = load_tokens(name, "val", config)
    if n_windows:
        tokens = tokens[:n_windows * config.block_size]
    check_tokens(tokens, config.vocab_size)
    try:
        text = open_tokenizer(config).decode_bytes(tokens.tolist())
    except UserError:  # the loss does not need the tokenizer
        return tokens, None
    return tokens, None if text is None else len(text)


def make_windows(n_tokens, context, stride):
    """Where windows begin and end, and the first token that each of them scores: [(begin, first, end)]."""
    windows, scored = [], 0
    for begin in range(0, n_tokens, stride):
        end = min(begin + context, n_tokens)
        windows.append((begin, max(scored, begin + 1), end))
        scored = end
        if end == n_tokens:
            break
    return [(begin, first, end) for begin, first, end in windows if first < end]


def score(model, tokens, stride, batch_size, autocast):
    """Sum of the losses in nats, and how many tokens were scored, with a bar of progress."""
    from tqdm import tqdm

    from kronygpt import data

    windows = make_windows(len(tokens), model.config.block_size, stride)
    with autocast, tqdm(total=len(tokens), unit="tok", unit_scale=True, leave=False, disable=None) as progress:
        for total, n_scored in data.score(model, tokens, windows, batch_size):
            progress.update(n_scored - progress.n)
    return total, n_scored


def check_arguments(dataset, n_batches):
    check_range(globals(), "batch_size", at_least=1, at_most=10**9)
    if n_batches is not None and (is_text(dataset) or not re.fullmatch("[1-9][0-9]{0,8}", n_batches)):
        raise UserError(f"n_batches is a whole number, and for a data set under data/ only, not {dataset} {n_batches}")
    if json_out:
        check_is_file(json_out)
        if not Path(json_out).parent.is_dir():
            raise UserError(f"no folder for --json_out={json_out}")


def main(ckpt, dataset=None, n_batches=None):
    from kronygpt import checkpoint
    from kronygpt.device import autocast_to, pick_device

    check_arguments(dataset, n_batches)
    model, _ = checkpoint.load(ckpt)
    model.to(pick_device(device)).eval()
    step = model.config.block_size if stride is None else stride
    if not 1 <= step <= model.config.block_size:
        raise UserError(f"--stride is from 1 to the model's context of {model.config.block_size}, not {step}")
    results = {}
    head = f"{'data set':<12} {'perplexity':>10} {'loss':>8} {'tokens scored':>13} {'bits per byte':>13} {'tokens/s':>9}"
    for name in [dataset] if dataset else PUBLISHED:
        if is_text(name):
            tokens, n_bytes = load_text_tokens(name, model.config, tokenizer)
        else:
            n_windows = int(n_batches or OWT_BATCHES if name == "owt" else n_batches or 0) * batch_size
            tokens, n_bytes = load_bin_tokens("openwebtext" if name == "owt" else name, n_windows, model.config)
        if len(tokens) < 2:
            raise UserError(f"{name} has {len(tokens)} tokens, and one is scored by those before it: give more text")
        start = time.perf_counter()
        total, n_scored = score(model, tokens, step, batch_size, autocast_to(model.lm_head.weight.device, dtype))
        seconds = time.perf_counter() - start
        loss = total / n_scored
        if not abs(loss) <= LARGEST_LOSS:
            raise UserError(f"the loss on {name} in {dtype} is {loss:g}, which has no perplexity", status=1)
        bits = loss / math.log(2) * len(tokens) / n_bytes if n_bytes else None
        results[name] = dict(perplexity=math.exp(loss), loss=loss, tokens_scored=n_scored, bits_per_byte=bits,
                             tokens_per_second=n_scored / seconds)
        if len(results) == 1:
            print(head)
        print(f"{name:<12} {math.exp(loss):>10.3f} {loss:>8.4f} {n_scored:>13,} "
              f"{'-' if bits is None else f'{bits:.4f}':>13} {n_scored / seconds:>9,.0f}")
    if json_out:
        with atomic_write(json_out, "w") as file:
            file.write(json.dumps(results, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    run(main)
