"""Convert a checkpoint to a Hugging Face GPT-2 directory that transformers loads with nothing of ours installed.

    python kron_to_gpt.py out/ckpt.pt               # → models/<name>/: of the file, or of its folder for ckpt.pt, best.pt
    python kron_to_gpt.py out/ckpt.pt my_model      # → my_model/
    python kron_to_gpt.py out/ckpt.pt my_model --compressed=True --dtype=bfloat16

The Kronecker sums are expanded, so the result is a dense GPT-2 that computes the same function. Hidden units that prune.py
dropped are left out of it. It is compared with the checkpoint's model before it is moved into place. Its tokenizer comes
along as data: GPT-2's, bytes, or the model's own.

With --compressed=True the factors are kept, and the file is as small as the checkpoint's model. Code comes along,
modeling_kronygpt.py, and transformers runs it where it is told to: from_pretrained(directory, trust_remote_code=True).

--push=ORG/NAME uploads the finished directory, with whatever else lies in it, to the Hugging Face hub.
"""
import shutil
from pathlib import Path

from kronygpt.configurator import UserError, check_choice, run
from kronygpt.files import atomic_directory

compressed = False  # keep the factors: a smaller model, which needs trust_remote_code=True
dtype = "float32"  # of the weights: float32, bfloat16 or float16
perplexities: str | None = None  # a file of perplexity.py --json_out, for the model card of --compressed=True
push: str | None = None  # ORG/NAME on the Hugging Face hub, to which the finished directory is uploaded
tokenizer: str | None = None  # directory of the tokenizer; default: the model's
tolerance: float | None = None  # largest difference of a logit that counts as rounding; default: as largest_allowed() says
seed = 1337  # of the random tokens for the comparison

CODE = "modeling_kronygpt.py"
CARD = "README.md"


def find_tokenizer(config):
    """The model's tokenizer; where it cannot be had, a line is printed, since the weights do not need it."""
    from kronygpt.tokenizer import UnknownTokenizer, open_tokenizer

    try:
        ours = open_tokenizer(config, tokenizer)
        if ours.name != UnknownTokenizer.name:
            return ours
        why = f"no tokenizer is known for the vocabulary of {config.vocab_size} (--tokenizer=DIRECTORY names one)"
    except UserError as error:
        if tokenizer:
            raise
        why = error
    print(f"{why}: only the weights are written")
    return UnknownTokenizer(config.vocab_size)


def default_name(path):
    """The name of a checkpoint's model: that of the file, or of its folder where the file is ckpt.pt or best.pt."""
    path = Path(path).resolve()
    return path.parent.name if path.stem in ("ckpt", "best") else path.stem


def is_ours(name):
    """Whether a file of this name in a model's directory is one that an export writes or makes obsolete."""
    from kronygpt.tokenizer import TOKENIZER_FILES

    is_weights = name.endswith((".safetensors", ".safetensors.index.json")) or name.startswith("pytorch_model")
    return is_weights or name in ("config.json", "generation_config.json", CODE, *TOKENIZER_FILES)


def main(ckpt, out_dir=None):
    import torch
    from transformers.utils import logging

    from kronygpt import checkpoint, export, hub
    from kronygpt.compress import without_dropped_units
    from kronygpt.export import is_card, model_card, read_perplexities, save_weights, verify
    from kronygpt.tokenizer import BytesTokenizer, UnknownTokenizer

    check_choice(globals(), "dtype", "float32", "bfloat16", "float16")
    if perplexities and not compressed:
        raise UserError("--perplexities is for the model card of --compressed=True")
    scores = read_perplexities(perplexities) if perplexities else {}
    if push:
        hub.check_push(push)
    out_dir = Path(out_dir or checkpoint.MODELS_DIR / default_name(ckpt))
    if out_dir.exists() and not (out_dir / "config.json").exists():
        raise UserError(f"{out_dir} exists and is no Hugging Face model: name another directory")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model, rest = checkpoint.load(ckpt)
    ours = find_tokenizer(model.config)
    narrow = without_dropped_units(model)
    if compressed and all(matrix.is_dense for _, _, matrix in narrow.matrices()):
        raise UserError(f"every matrix of {ckpt} is dense: the plain export, without --compressed=True, is as small and "
                        "needs no code")
    has_card = is_card(out_dir / CARD)
    with atomic_directory(out_dir, lambda name: is_ours(name) or (name == CARD and has_card)) as aside, \
            export.no_code_left():
        exported = export.to_compressed(narrow) if compressed else export.to_transformers(narrow)
        exported.to(getattr(torch, dtype))
        # generation ends at GPT-2's <|endoftext|>, but not at the line end that ends a document of bytes
        end = None if ours.name in (BytesTokenizer.name, UnknownTokenizer.name) else ours.end_of_text
        for config in exported.config, exported.generation_config:
            config.bos_token_id = config.eos_token_id = end
        save_weights(exported, aside)
        if ours.name != UnknownTokenizer.name:
            export.write_tokenizer(aside, ours, model.config.block_size)
        if compressed:
            shutil.copyfile(Path(__file__).parent / "kronygpt" / CODE, aside / CODE)
            card = model_card(push or out_dir.resolve().name, narrow, rest, scores, dtype)
            (aside / CARD).write_text(card, encoding="utf-8")
        difference = verify(model, aside, ckpt, compressed, dtype, tolerance, seed)
    counts = model.count_parameters()["total"], sum(p.numel() for p in exported.parameters())
    if narrow is not model:
        print(f"MLPs of {narrow.config.n_inner} hidden units: B drops the others of {model.config.n_inner}")
    expanded = "" if compressed else f", {counts[1]:,} with the Kronecker sums expanded"
    size = sum(file.stat().st_size for file in out_dir.glob("*.safetensors")) / 2**20
    print(f"wrote {out_dir}/ ({size:,.1f} MiB): {counts[0]:,} parameters{expanded}; logits differ by at most "
          f"{difference:.1e}")
    if push:
        print(f"uploaded to {hub.upload(out_dir, push)}")


if __name__ == "__main__":
    run(main)
