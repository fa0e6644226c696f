"""Convert a checkpoint to a Hugging Face GPT-2 directory that transformers loads with nothing of ours installed.

    python kron_to_gpt.py out/ckpt.pt               # → models/<name>/: of the file, or of its folder for ckpt.pt, best.pt
    python kron_to_gpt.py out/ckpt.pt my_model      # → my_model/

The Kronecker sums are written out, so the result is a dense GPT-2 that computes the same function: it is compared with
the checkpoint's own model before it takes its place.
"""
import base64
import os
import tempfile
from pathlib import Path

from configurator import UsageError, run

tolerance = 1e-3  # largest difference of a logit that is taken for rounding
seed = 1337  # of the random tokens for the comparison

TOKENS_COMPARED = 256


class ConversionError(Exception):
    """The converted model is not the same function."""

    exit_status = 1


def make_tokenizer(vocab_size, block_size):
    """The transformers tokenizer of a model: GPT-2's BPE, or one token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

    from data import tokenizer_for

    ours = tokenizer_for(vocab_size)
    if ours.name == "bytes":
        vocab = {character: byte for byte, character in bytes_to_unicode().items()}
        tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=block_size)
    encoding, end = ours.encoding, "<|endoftext|>"
    with tempfile.NamedTemporaryFile("wb") as ranks:  # in tiktoken's own format, which the converter reads
        for token in sorted(encoding.token_byte_values(), key=encoding.encode_single_token):
            ranks.write(base64.b64encode(token) + b" %d\n" % encoding.encode_single_token(token))
        ranks.flush()
        tokenizer = TikTokenConverter(ranks.name, encoding._pat_str, extra_special_tokens=[end]).converted()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end,
                                   model_max_length=block_size)


def default_out_dir(path):
    """models/<name of the checkpoint>, or of its folder where the file is ckpt.pt or best.pt."""
    from checkpoint import MODELS_DIR

    path = Path(path).resolve()
    return MODELS_DIR / (path.parent.name if path.stem in ("ckpt", "best") else path.stem)


def largest_difference(model, directory):
    """The largest absolute difference of a logit between a KronyGPT and the transformers model in a directory."""
    import torch
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    length = min(TOKENS_COMPARED, model.config.block_size)
    idx = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        return (model.eval()(idx) - exported(idx).logits).abs().max().item()


def main(ckpt, out_dir=None):
    out_dir = Path(out_dir or default_out_dir(ckpt))
    if out_dir.exists() and not (out_dir / "config.json").exists():
        raise UsageError(f"{out_dir} exists and is no Hugging Face model: name another directory")
    import checkpoint

    model, _ = checkpoint.load(ckpt)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as folder:
        aside = Path(folder) / out_dir.name
        tokenizer = make_tokenizer(model.config.vocab_size, model.config.block_size)
        exported = model.to_transformers()
        exported.config.bos_token_id = exported.config.eos_token_id = tokenizer.eos_token_id
        exported.generation_config.bos_token_id = exported.generation_config.eos_token_id = tokenizer.eos_token_id
        exported.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        difference = largest_difference(model, aside)
        if not difference < tolerance:
            raise ConversionError(f"the converted model differs from {ckpt} by {difference:.1e} in a logit, more than "
                                  f"--tolerance={tolerance}; nothing was written")
        out_dir.mkdir(exist_ok=True)
        for file in aside.iterdir():  # what else lies in the directory stays
            os.replace(file, out_dir / file.name)
    counts = model.count_parameters()["total"], sum(p.numel() for p in exported.parameters())
    print(f"wrote {out_dir}/: {counts[0]:,} parameters, {counts[1]:,} with the Kronecker sums written out; "
          f"logits differ by at most {difference:.1e}")


if __name__ == "__main__":
    run(main)
