"""Text from a model, printed as it comes.

    python sample.py out/ckpt.pt --start="The answer is"
    python sample.py gpt2 --start=FILE:prompt.txt --num_samples=3 --temperature=0.8 --top_k=200

The model is a .pt file, a Hugging Face directory, a name under models/ or a hub name.
"""
from pathlib import Path

from kronygpt.configurator import run

start = "\n"  # the prompt, or FILE:path to read it from a file; <|endoftext|> in it is the token; empty: only that token
tokenizer: str | None = None  # directory of the tokenizer; default: the model's
num_samples = 1  # number of continuations
max_new_tokens = 200  # tokens in each
temperature = 0.8  # divides the logits; 0 takes the most likely token
top_k = 200  # sample among the N most likely tokens; 0 for all
seed = 1337  # seed for sampling
device = ""  # cuda, mps, cpu, ...; default: CUDA if available, else Apple's mps, else the CPU
dtype = "float32"  # type of the weights and of all that is computed: float32, bfloat16 or float16


def main(ckpt):
    import torch

    from kronygpt import checkpoint
    from kronygpt.device import pick_device
    from kronygpt.tokenizer import open_tokenizer, stream_text

    prompt = Path(start[5:]).read_text(encoding="utf-8-sig") if start.startswith("FILE:") else start
    model, _ = checkpoint.load(ckpt, as_stored=True)
    text_tokenizer = open_tokenizer(model.config, tokenizer)
    tokens = text_tokenizer.encode_prompt(prompt)
    torch_device = pick_device(device)
    model.to(torch_device, getattr(torch, dtype))
    idx = torch.tensor([tokens], device=torch_device)
    torch.manual_seed(seed)
    for _ in range(num_samples):
        print(text_tokenizer.decode(tokens), end="", flush=True)
        new = model.generate(idx, max_new_tokens, temperature, top_k or None)
        for text in stream_text(text_tokenizer, (token.item() for token in new), tokens[-1]):
            print(text, end="", flush=True)
        print("\n" + "-" * 80)


if __name__ == "__main__":
    run(main)
