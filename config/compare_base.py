# Ours beside its peers at three sizes, for the GPT-2 of `make base` (config/base.py): 66, 50 and 30 % of its 6.90M
# parameters. 66 % is the share that Krony-PT leaves of GPT-2, so Van Loan and pruning stand beside it. At 30 % the methods
# that leave embeddings dense have nothing left for the blocks.
base = "out/base/best.pt"
train_config = "config/compare_base_train.py"
dataset = "pysource"
out_dir = "out/compare_base"
seeds = "1,2,3"
n_batches = 100

starts = """
4.5M Van Loan: kron_decompose.py 256 256 1 | --learning_rate=1e-3
4.5M one row in four kept: prune.py --keep=4 | --learning_rate=1e-3
4.5M hidden units pruned, refitted: prune.py --dim=hidden --keep=4 --select=contribution --refit --calibrate=pysource | --learning_rate=1e-3
4.5M SVD-LLM: experiments/peers.py svd_llm 4.542M --calibrate=pysource | --learning_rate=1e-4
4.5M activation-aware SVD, even ranks: experiments/peers.py even_ranks 4.542M --calibrate=pysource | --learning_rate=1e-4
4.5M ours: kron_decompose.py --budget=4.542M --calibrate=pysource | --learning_rate=3e-5
3.5M SVD-LLM: experiments/peers.py svd_llm 3.451M --calibrate=pysource | --learning_rate=3e-4
3.5M activation-aware SVD, even ranks: experiments/peers.py even_ranks 3.451M --calibrate=pysource | --learning_rate=3e-4
3.5M ours: kron_decompose.py --budget=3.451M --calibrate=pysource | --learning_rate=1e-4
2.1M ours: kron_decompose.py --budget=2.071M --calibrate=pysource | --learning_rate=3e-4
"""
