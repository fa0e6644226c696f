"""Convert a checkpoint to a Hugging Face GPT-2 directory that transformers loads with nothing of ours installed.

    python kron_to_gpt.py out/run/best.pt           # → models/run/; of out/mine.pt: models/mine/
    python kron_to_gpt.py out/ckpt.pt my_model      # → my_model/
    python kron_to_gpt.py out/ckpt.pt my_model --compressed=True --dtype=bfloat16
    python kron_to_gpt.py gpt2 my_model --compressed=True --dtype=int8         # a dense GPT-2, too

The Kronecker sums are expanded, so the result is a dense GPT-2 that computes the same function. Hidden units that prune.py
dropped are left out of it. It is compared with the checkpoint's model before it is moved into place. Its tokenizer comes
along as data: GPT-2's, bytes, or the model's own. Where it is unknown, only the weights are written.

With --compressed=True the factors are kept, and the file is as small as the checkpoint's model. Code comes along,
modeling_kronygpt.py, and transformers runs it where it is told to: from_pretrained(directory, trust_remote_code=True).
--dtype=int8 then stores weights in a byte, with one float32 scale for each output column of a matrix or factor and each
token of the embedding; biases and layer norms are float32. Weights are rounded, and computed in the model's floating type.

--push=ORG/NAME uploads the finished directory, with whatever else lies in it, to the Hugging Face hub.
"""
import shutil
from fnmatch import fnmatch
from pathlib import Path

from kronygpt.configurator import UserError, check_choice, run

compressed = False  # keep the factors: a smaller model, which needs trust_remote_code=True
dtype = "float32"  # type of the weights: float32, bfloat16 or float16; with --compressed=True also int8
perplexities: str | None = None  # a file of perplexity.py --json_out, for the model card of --compressed=True
push: str | None = None  # ORG/NAME on the Hugging Face hub, to which the finished directory is uploaded
tokenizer: str | None = None  # directory of the tokenizer; default: the model's
tolerance: float | None = None  # largest difference of a logit that counts as rounding; default: export.largest_allowed()


def default_directory(ckpt, models):
    """models/<name> for a checkpoint: of the file, or of its folder where that is ckpt.pt or best.pt; compare.py has
    a folder seed_N for each seed of a start."""
    path = Path(ckpt).resolve()
    if path.stem not in ("ckpt", "best"):
        return models / path.stem
    seed = path.parent.name.startswith("seed_")
    return models / (f"{path.parent.parent.name}_{path.parent.name}" if seed else path.parent.name)


def find_tokenizer(config):
    """The model's tokenizer, or None where it cannot be had. A line is then printed, since the weights do not need it."""
    from kronygpt.tokenizer import GPT2Tokenizer, open_tokenizer

    try:
        found = open_tokenizer(config, tokenizer)
        if isinstance(found, GPT2Tokenizer):
            found.encode("a")  # its files are downloaded now, and not after the work
        return found
    except UserError as error:
        if tokenizer:
            raise
        print(f"only the weights are written: {error}")


def main(ckpt, out_dir=None):
    import torch
    from transformers.utils import logging

    from kronygpt import checkpoint, export, hub
    from kronygpt.compress import without_dropped_units
    from kronygpt.files import atomic_directory, output_directory
    from kronygpt.tokenizer import TOKENIZER_FILES, BytesTokenizer, read_json

    # what can be refused before the work
    check_choice(globals(), "dtype", "float32", "bfloat16", "float16", "int8")
    if dtype == "int8" and not compressed:
        raise UserError("--dtype=int8 needs --compressed=True, whose code takes it, also for a model with no factors")
    scores = read_json(Path(perplexities)) if perplexities else {}
    out_dir = output_directory(out_dir or default_directory(ckpt, checkpoint.MODELS_DIR))
    old_type = read_json(out_dir / "config.json", {}).get("model_type")
    if out_dir.exists() and old_type not in ("gpt2", checkpoint.COMPRESSED_TYPE):
        raise UserError(f"{out_dir} exists and holds no GPT-2 of transformers: name another directory")
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    # the model
    model, rest = checkpoint.load(ckpt, as_stored=True)
    found = find_tokenizer(model.config)
    narrow = without_dropped_units(model)
    if narrow is not model:
        print(f"MLPs of {narrow.config.n_inner[0]} hidden units: B drops the others of {model.config.n_inner[0]}")
    if dtype == "int8":
        exported = export.to_compressed(narrow, int8=True)
    else:
        exported = (export.to_compressed if compressed else export.to_dense)(narrow).to(getattr(torch, dtype))
    # generation ends at GPT-2's <|endoftext|>, but not at the line end that ends a document of bytes
    end = None if found is None or found.name == BytesTokenizer.name else found.end_of_text
    for config in exported.config, exported.generation_config:
        config.bos_token_id = config.eos_token_id = end

    # the directory, which replaces an older one as a whole; files of others in it stay
    card = out_dir / "README.md"
    is_card_ours = not card.exists() or export.MARK.encode() in card.read_bytes()
    replaced = ["config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json",
                "pytorch_model*", export.CODE.name, *TOKENIZER_FILES, *([card.name] if is_card_ours else [])]
    with atomic_directory(out_dir, lambda name: any(fnmatch(name, pattern) for pattern in replaced)) as aside:
        exported.save_pretrained(aside)
        for file in aside.glob("*.safetensors"):  # which only their owner may read
            shutil.copymode(aside / "config.json", file)
        if found:
            export.write_tokenizer(aside, found, model.config.block_size)
        if compressed:
            shutil.copyfile(export.CODE, aside / export.CODE.name)
            if is_card_ours:
                text = export.model_card(push or out_dir.name, narrow, rest, scores, dtype)
                (aside / card.name).write_text(text, encoding="utf-8")
        difference = export.verify(model, aside, compressed, dtype, tolerance)

    # the report
    before, after = model.count_parameters()["total"], sum(p.numel() for p in exported.parameters())
    expanded = "" if compressed or after == before else f", {after:,} as a dense model"
    size = sum(file.stat().st_size for file in out_dir.glob("model*.safetensors")) / 2**20
    print(f"wrote {out_dir}/ ({size:,.1f} MiB): {before:,} parameters{expanded}; logits differ by at most {difference:.1e}"
          + " by rounding" * (dtype == "int8"))
    if push:
        print(f"uploaded to {hub.upload(out_dir, push)}")


if __name__ == "__main__":
    run(main)
