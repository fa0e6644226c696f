"""Perplexity of a model on a data set.

    python perplexity.py ckpt wiki103           # wiki103, wiki2 or lambada; all three without a name
    python perplexity.py ckpt owt 200           # 200 batches of data/openwebtext/val.bin
    python perplexity.py ckpt pydocs            # the validation split of a data set under data/
    python perplexity.py ckpt book.txt          # a file: UTF-8 text, or rows with a `text`: .jsonl, .csv, .parquet, ...

ckpt is a .pt file, a Hugging Face directory, a name under models/ or a hub name; a .pt is scored as it is. Rows of a
data set, except nulls, are joined by blank lines. The text is cut into windows of the model's context, one every --stride
tokens (default: no overlap), and each window scores the tokens that no earlier window has scored. The first token of a
window has no context and is not scored in that window. Perplexity is exp of the mean loss over the tokens scored; bits per
byte divides the same loss by the text's bytes. A text is tokenized with the model's own tokenizer. wiki103 and wiki2 are
the test splits of wikitext-103-v1 and wikitext-2-v1, in which rare words are <unk>.

Figures of lm_eval (EleutherAI's evaluation harness) are not comparable: its wikitext detokenizes WikiText-2's pages, scores
each page by itself and divides by words or original bytes; its lambada_openai scores the last word of each passage only.
Here every token counts, and the rows are scored as they are, as one text.
"""
import json
import math
import time
from pathlib import Path

from kronygpt import checkpoint, data
from kronygpt.configurator import UserError, progress, run
from kronygpt.device import autocast_to, keep_freed_memory, pick_device
from kronygpt.files import atomic_write, output_file
from kronygpt.hub import hub_dataset
from kronygpt.tokenizer import open_tokenizer, well_formed

stride: int | None = None  # tokens between the starts of two windows; default: the model's context
wikitext = "Salesforce/wikitext"  # hub name, or a local directory with the same layout
lambada = "cimec/lambada"  # hub name, or a local .jsonl
tokenizer: str | None = None  # directory of the tokenizer; default: the model's
batch_size = 4  # windows in a batch
device = ""  # cuda, mps, cpu, ...; default: CUDA if available, else Apple's mps, else the CPU
dtype = "float32"  # float32, or by autocast bfloat16 or float16
json_out: str | None = None  # file for the results as JSON

PUBLISHED = {"wiki103": "wikitext-103-v1", "wiki2": "wikitext-2-v1", "lambada": None}  # {name: configuration on the hub}
OWT_BATCHES = 200


def is_text(name):
    """Whether a data set is text, and no .bin of tokens: a published one or a file."""
    return name in PUBLISHED or data.kind_of(name) in (".txt", *data.ROWS) or (
        Path(name).is_file() and not (data.DATA_DIR / name).is_dir())


def load_rows(name):
    """The texts of a data set: wiki103, wiki2, lambada, or the path of a file."""
    if name not in PUBLISHED:
        return list(data.read_rows(name))
    path, config = lambada if name == "lambada" else wikitext, PUBLISHED[name]
    if files := [path] if Path(path).is_file() else sorted(Path(path, config or "").glob("test-*.parquet")):
        return [row for file in files for row in data.read_rows(file)]
    return list(data.texts_of(hub_dataset(path, config, split="test"), "text", path))


def load_text_tokens(name, config, directory=None):
    """The tokens of a text data set, by the tokenizer of a KronyGPTConfig or that in a directory, and its bytes."""
    text = well_formed("\n\n".join(load_rows(name)))
    return open_tokenizer(config, directory).encode(text), len(text.encode())


def load_bin_tokens(name, n_windows, config):
    """The tokens of data/<name>/val.bin, or the first n_windows contexts of them, and their length in bytes, None where
    nobody knows their text."""
    tokens = data.load_tokens(name, "val", config)[:n_windows * config.block_size or None]
    try:
        return tokens, len(open_tokenizer(config).decode_bytes(tokens.tolist()))
    except UserError:  # the loss does not need the tokenizer
        return tokens, None


def main(ckpt, dataset=None, n_batches=None):
    if n_batches and is_text(dataset):
        raise UserError(f"n_batches is for a data set under data/ only, not for {dataset}")
    if json_out:
        output_file(json_out)
    model, _ = checkpoint.load(ckpt, as_stored=True)
    torch_device = pick_device(device)
    keep_freed_memory(torch_device)
    model.to(torch_device).eval()
    context = model.config.block_size
    step = context if stride is None else stride
    if not 1 <= step <= context:
        raise UserError(f"--stride is from 1 to the model's context of {context}, not {step}")

    results = {}
    for name in [dataset] if dataset else PUBLISHED:
        if is_text(name):
            tokens, n_bytes = load_text_tokens(name, model.config, tokenizer)
        else:
            n_windows = int(n_batches or OWT_BATCHES if name == "owt" else n_batches or 0) * batch_size
            tokens, n_bytes = load_bin_tokens("openwebtext" if name == "owt" else name, n_windows, model.config)
        if len(tokens) < 2:
            raise UserError(f"{name} has {len(tokens)} tokens, and one is scored by those before it: give more text")

        start, autocast = time.perf_counter(), autocast_to(next(model.parameters()).device, dtype)
        with autocast, progress(desc=name, total=len(tokens), unit="tokens", unit_scale=True) as bar:
            for so_far in data.score(model, tokens, data.sliding_windows(len(tokens), context, step), batch_size):
                bar.update(so_far[1] - bar.n)
        seconds, (total, n_scored) = time.perf_counter() - start, so_far

        loss = total / n_scored
        if not math.isfinite(loss):
            raise UserError(f"the loss on {name} in {dtype} is {loss}", status=1)
        bits = loss / math.log(2) * len(tokens) / n_bytes if n_bytes else None
        results[name] = dict(perplexity=math.exp(loss), loss=loss, tokens_scored=n_scored, bits_per_byte=bits,
                             tokens_per_second=n_scored / seconds)
        if len(results) == 1:
            print(f"{'data set':<12} {'perplexity':>10} {'loss':>8} {'tokens scored':>13} {'bits per byte':>13}  tokens/s")
        print(f"{name:<12} {math.exp(loss):>10.3f} {loss:>8.4f} {n_scored:>13,} "
              f"{'-' if bits is None else f'{bits:.4f}':>13} {n_scored / seconds:>9,.0f}")
    if json_out:
        with atomic_write(json_out, "w") as file:
            file.write(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
