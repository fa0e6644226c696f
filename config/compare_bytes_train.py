# What each start of config/compare_bytes.py gets: 300 steps of 1,024 bytes.
batch_size = 4
gradient_accumulation_steps = 1
max_iters = 300
learning_rate = 6e-4  # of 3e-4, 6e-4, 1e-3 and 2e-3 the best for Van Loan's start; calibrated ones like 3e-4 better
warmup_iters = 20
beta2 = 0.99
eval_interval = 100
eval_iters = 10
log_interval = 100
