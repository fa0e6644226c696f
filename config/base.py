# A dense GPT-2 with a real vocabulary that anyone can make: 6 blocks, 256 wide, 8,192 tokens, 6.9M parameters, of which the
# token embedding is 30 %, trained on the Python source in the environment (experiments/prepare_pysource.py). `make base`
# takes about an hour on two cores. With --dtype=bfloat16, on a processor that has units for it (amx_bf16 or avx512_bf16 in
# lscpu), it takes a third less.
out_dir = "out/base"
dataset = "pysource"

n_layer = 6
n_head = 4
n_embd = 256
block_size = 256

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 3000  # of 4,096 tokens: two thirds of the text
learning_rate = 1.5e-3
decay = "linear"  # to 0
warmup_iters = 200
beta2 = 0.99
eval_interval = 600
eval_iters = 40
log_interval = 100
checkpoint_minutes = 10.0
