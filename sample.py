"""Text from a model.

    python sample.py out/ckpt.pt --start="The answer is"
    python sample.py gpt2 --start=FILE:prompt.txt --num_samples=3 --temperature=0.8 --top_k=200

The model is a .pt file, a Hugging Face directory, a name under models/ or a hub name. Without a tokenizer for it, an empty
prompt begins with token 0, and the numbers of the tokens are printed.
"""
from kronygpt.configurator import UserError, check_range, run

start = "\n"  # the prompt, in which <|endoftext|> is the token; FILE:path reads it from a file; empty: the token alone
tokenizer: str | None = None  # directory of the tokenizer; default: the model's
num_samples = 1  # number of continuations
max_new_tokens = 200  # tokens in each
temperature = 0.8  # divides the logits; 0 takes the most likely token
top_k = 200  # sample among the N most likely tokens; 0 for all
seed = 1337  # of the sampling
device = ""  # cuda, cpu, ...; default: CUDA if available, else the CPU
dtype = "float32"  # bfloat16 or float16, by autocast

MAY_BE_EMPTY = ("start",)


def main(ckpt):
    import numpy as np
    import torch

    from kronygpt import checkpoint
    from kronygpt.data import check_tokens, read_pieces
    from kronygpt.device import autocast_to, pick_device
    from kronygpt.tokenizer import TOKEN_TYPE, open_tokenizer

    check_range(globals(), "num_samples", at_least=1, at_most=10**9)
    prompt = "".join(read_pieces(start.removeprefix("FILE:"))) if start.startswith("FILE:") else start
    model, _ = checkpoint.load(ckpt)
    text_tokenizer = open_tokenizer(model.config, tokenizer)
    tokens = text_tokenizer.encode_prompt(prompt)
    if not tokens:
        raise UserError("the prompt is empty, and the model's tokenizer has no end-of-text token: give --start")
    check_tokens(np.array(tokens, TOKEN_TYPE), model.config.vocab_size)
    torch_device = pick_device(device)
    idx = torch.tensor([tokens] * num_samples, device=torch_device)
    with autocast_to(torch_device, dtype):
        new = list(model.to(torch_device).generate(idx, max_new_tokens, temperature, top_k or None, seed))
    for row in torch.cat((idx, *new), dim=1).tolist():
        print(text_tokenizer.decode(row))
        print("-" * 80)


if __name__ == "__main__":
    run(main)
