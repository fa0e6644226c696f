"""Text from a model.

    python sample.py out/ckpt.pt --start="The answer is"
    python sample.py gpt2 --start=FILE:prompt.txt --num_samples=3 --temperature=0.8 --top_k=200

The model is a .pt file, a Hugging Face directory, a name under models/ or a hub name. Without a tokenizer for it, an empty
prompt begins with token 0, and the numbers of the tokens are printed.
"""
from pathlib import Path

from configurator import UserError, check_range, run

start = "\n"  # the prompt, in which <|endoftext|> is the token; FILE:path reads it from a file; empty: the token alone
tokenizer: str | None = None  # directory of the tokenizer; default: the model's
num_samples = 1  # number of continuations
max_new_tokens = 200  # tokens in each
temperature = 0.8  # divides the logits; 0 takes the most likely token
top_k = 200  # sample among the N most likely tokens; 0 for all
seed = 1337  # of the sampling
device = ""  # cuda, cpu, ...; default: CUDA if available, else the CPU
dtype = "float32"  # bfloat16 or float16, by autocast


def main(ckpt):
    import numpy as np
    import torch

    import checkpoint
    from data import check_tokens
    from device import autocast_to, pick_device
    from tokenizer import TOKEN_TYPE, open_tokenizer

    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is from 0 to 2**63 - 1, not {seed}")
    check_range(globals(), "num_samples max_new_tokens", at_least=1)
    check_range(globals(), "temperature top_k", at_least=0)
    prompt = start
    if start.startswith("FILE:"):
        try:
            prompt = Path(start.removeprefix("FILE:")).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{start.removeprefix('FILE:')} is not UTF-8 text: {error}") from None
    model, rest = checkpoint.load(ckpt)
    text_tokenizer = open_tokenizer(rest.get("tokenizer"), model.config.vocab_size, tokenizer)
    tokens = text_tokenizer.encode_prompt(prompt)
    if not tokens:
        raise UserError("the prompt is empty, and the model's tokenizer has no end-of-text token: give --start")
    check_tokens(np.array(tokens, TOKEN_TYPE), model.config.vocab_size)
    torch_device = pick_device(device)
    idx = torch.tensor([tokens] * num_samples, device=torch_device)
    with autocast_to(torch_device, dtype):
        rows = model.to(torch_device).generate(idx, max_new_tokens, temperature, top_k or None, seed)
    for row in rows.tolist():
        print(text_tokenizer.decode(row))
        print("-" * 80)


if __name__ == "__main__":
    run(main)
