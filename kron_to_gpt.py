"""Convert a checkpoint to a Hugging Face GPT-2 directory that transformers loads with nothing of ours installed.

    python kron_to_gpt.py out/ckpt.pt               # → models/<name>/: of the file, or of its folder for ckpt.pt, best.pt
    python kron_to_gpt.py out/ckpt.pt my_model      # → my_model/

The Kronecker sums are expanded, so the result is a dense GPT-2 that computes the same function. It is compared with the
checkpoint's model before it is moved into place.
"""
import base64
import os
import tempfile
from pathlib import Path

from configurator import UserError, run

tolerance = 1e-3  # largest difference of a logit that counts as rounding
seed = 1337  # of the random tokens for the comparison

TOKENS_COMPARED = 256


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


def default_name(path):
    """The name of a checkpoint's model: that of the file, or of its folder where the file is ckpt.pt or best.pt."""
    path = Path(path).resolve()
    return path.parent.name if path.stem in ("ckpt", "best") else path.stem


def to_transformers(model):
    """The transformers GPT2LMHeadModel that computes the same function as a KronyGPT, with the Kronecker sums expanded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    hf_model = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, n_inner=None if config.n_inner == 4 * config.n_embd else config.n_inner,
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout))
    state_dict = model.state_dict()
    for name, matrix in model.matrices():
        state_dict[f"{name}.weight"] = matrix.weight  # [in, out], as Conv1D has it
        del state_dict[f"{name}.A"], state_dict[f"{name}.B"]
    hf_model.load_state_dict(state_dict)
    return hf_model.eval()


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
    from transformers.utils import logging

    import checkpoint

    out_dir = Path(out_dir or checkpoint.MODELS_DIR / default_name(ckpt))
    if out_dir.exists() and not (out_dir / "config.json").exists():
        raise UserError(f"{out_dir} exists and is no Hugging Face model: name another directory")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model, _ = checkpoint.load(ckpt)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as folder:
        aside = Path(folder) / out_dir.name
        tokenizer = make_tokenizer(model.config.vocab_size, model.config.block_size)
        exported = to_transformers(model)
        exported.config.bos_token_id = exported.config.eos_token_id = tokenizer.eos_token_id
        exported.generation_config.bos_token_id = exported.generation_config.eos_token_id = tokenizer.eos_token_id
        exported.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        difference = largest_difference(model, aside)
        if not difference < tolerance:
            raise UserError(f"the converted model differs from {ckpt} by {difference:.1e} in a logit, more than "
                            f"--tolerance={tolerance}; nothing was written", status=1)
        out_dir.mkdir(exist_ok=True)
        for file in aside.iterdir():  # other files in the directory stay
            os.replace(file, out_dir / file.name)
    counts = model.count_parameters()["total"], sum(p.numel() for p in exported.parameters())
    print(f"wrote {out_dir}/: {counts[0]:,} parameters, {counts[1]:,} with the Kronecker sums expanded; "
          f"logits differ by at most {difference:.1e}")


if __name__ == "__main__":
    run(main)
