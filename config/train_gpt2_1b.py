# One billion tokens for the model of train_gpt2_budget.py: a first result on GPT-2, with 2 GB of tokens.
#   python prepare_owt.py --documents=900000        # 1.0 billion of OpenWebText's 9 billion tokens
#   python kron_decompose.py --budget=82M --calibrate=openwebtext
#   python train.py config/train_gpt2_1b.py
# and the dense model, trained on as many tokens:
#   python train.py config/train_gpt2_1b.py --init_from=gpt2 --out_dir=out/gpt2_dense_1b
# Cost: 1.0B tokens at 6.0e8 FLOP each, as train.py counts them, are 6.0e17 FLOP: 1.7 GPU hours at 1e14 FLOP/s, a
# third of an A100's peak in bfloat16. This is arithmetic, not a measurement.
#
# Why these numbers: a twelfth of the steps of train_gpt2_budget.py, of the same size and at the same rates, with a whole
# warm-up and cosine of their own. By nanoGPT's count of 9.04 billion tokens in 8.01 million documents, 900,000 of them hold
# as many tokens as the run sees.
import torch

init_from = "checkpoints/best_82M.pt"
out_dir = "out/gpt2_1b"

# 32 sequences × 1024 tokens × 12 micro-steps over all GPUs = 393,216 tokens a step
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 12
max_iters = 2543

learning_rate = 6e-5
warmup_iters = 200

compile = torch.cuda.is_available()  # elsewhere it takes a C++ compiler, and minutes
eval_interval = 250
wandb_mode = "offline"  # `wandb sync` uploads it; WANDB_MODE=online in the environment does so at once
