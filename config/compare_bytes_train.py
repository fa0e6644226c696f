# What each start of config/compare_bytes.py gets: 300 steps of 512 bytes, each at its own learning rate.
batch_size = 2
gradient_accumulation_steps = 1
max_iters = 300
warmup_iters = 20
beta2 = 0.99
eval_interval = 150
eval_iters = 10
log_interval = 100
