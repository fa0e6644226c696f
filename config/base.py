# A dense GPT-2 with a real vocabulary that anyone can make: 6 blocks, 256 wide, 8,192 tokens, 7M parameters, of which the
# token embedding is 30 %, trained on the Python source in the environment (experiments/prepare_pysource.py). `make base`
# takes hours on two cores; how many has not been measured.
out_dir = "out/base"
dataset = "pysource"

n_layer = 6
n_head = 4
n_embd = 256
block_size = 256

batch_size = 8
gradient_accumulation_steps = 1
max_iters = 14000  # of 2,048 tokens: 1.5 times the text
learning_rate = 1.5e-3
min_lr = 1.5e-5
warmup_iters = 300
beta2 = 0.99
eval_interval = 1000
eval_iters = 40
log_interval = 100
checkpoint_minutes = 10.0
