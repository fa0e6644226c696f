"""Text from a model.

    python sample.py out/ckpt.pt --start="The answer is"
    python sample.py gpt2 --start=FILE:prompt.txt --num_samples=3 --temperature=0.8 --top_k=200

The model is a .pt file, a Hugging Face directory, a name under models/ or a hub name.
"""
from pathlib import Path

from configurator import UsageError, run

start = "\n"  # the text to continue; FILE:path reads it from a file
num_samples = 1  # how many continuations
max_new_tokens = 200  # of each
temperature = 0.8  # 1 is the model's own distribution, less is more cautious, 0 takes the likeliest token
top_k = 200  # sample among this many likeliest tokens; 0 for all
seed = 1337  # of the sampling
device = ""  # cuda, cpu, ...: what there is if left out
dtype = "float32"  # or bfloat16, by autocast


def main(ckpt):
    import torch

    import checkpoint
    from data import tokenizer_for
    from model import autocast_to, pick_device

    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed is from 0 to 2**63 - 1, not {seed}")
    if num_samples < 1 or max_new_tokens < 1 or temperature < 0 or top_k < 0:
        raise UsageError("--num_samples and --max_new_tokens are at least 1, --temperature and --top_k at least 0")
    prompt = start
    if start.startswith("FILE:"):
        try:
            prompt = Path(start.removeprefix("FILE:")).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{start.removeprefix('FILE:')} is not UTF-8 text: {error}") from None
    model, _ = checkpoint.load(ckpt)
    tokenizer = tokenizer_for(model.config.vocab_size)
    tokens = tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text]
    where = pick_device(device)
    idx = torch.tensor([tokens] * num_samples, device=where)
    with autocast_to(device, dtype):
        rows = model.to(where).generate(idx, max_new_tokens, temperature, top_k or None, seed)
    for row in rows.tolist():
        print(tokenizer.decode(row))
        print("-" * 80)


if __name__ == "__main__":
    run(main)
