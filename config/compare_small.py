# The starts of config/compare_bytes.py for the base of `make demo`, which config/demo_base.py trains: 4 blocks, 128 wide,
# over bytes, 0.842M parameters.
base = "out/demo/base/best.pt"
train_config = "config/compare_small_train.py"
dataset = "pydocs"
out_dir = "out/compare_small"
seeds = "1,2,3"

starts = f"""
dense, trained further: kron_decompose.py 128 512 1 | --learning_rate=3e-4
0.45M Van Loan: kron_decompose.py 128 128 1 | --learning_rate=1e-3
0.45M Krony-PT's pruning: prune.py --keep=4 | --learning_rate=3e-3
0.45M SVD of the MLPs: kron_decompose.py 128 1 25 | --learning_rate=1e-3
0.45M SVD of all matrices: experiments/peers.py even_ranks 446.3K | --learning_rate=3e-4
0.45M activation-aware SVD, even ranks: experiments/peers.py even_ranks 446.3K --calibrate=pydocs | --learning_rate=3e-4
0.45M hidden units pruned, refitted: prune.py --dim=hidden --keep=4 --select=contribution --refit --calibrate=pydocs | --learning_rate=1e-3
0.45M one block in two: prune.py --dim=layer | --learning_rate=1e-3
0.45M ours, MLPs only: kron_decompose.py --budget=446.3K --matrices=mlp --calibrate=pydocs | --learning_rate=3e-4
0.45M ours: kron_decompose.py --budget=446.3K --calibrate=pydocs | --learning_rate=3e-4
0.45M ours, distilled: kron_decompose.py --budget=446.3K --calibrate=pydocs | --teacher={base} --learning_rate=1e-3
0.58M Van Loan: kron_decompose.py 128 256 1 | --learning_rate=1e-3
0.58M Krony-PT's pruning: prune.py | --learning_rate=1e-3
0.58M SVD of the MLPs: kron_decompose.py 128 1 51 | --learning_rate=3e-4
0.58M SVD of all matrices: experiments/peers.py even_ranks 579.4K | --learning_rate=3e-4
0.58M activation-aware SVD, even ranks: experiments/peers.py even_ranks 579.4K --calibrate=pydocs | --learning_rate=3e-4
0.58M hidden units pruned, refitted: prune.py --dim=hidden --keep=2 --select=contribution --refit --calibrate=pydocs | --learning_rate=3e-4
0.58M ours, MLPs only: kron_decompose.py --budget=579.4K --matrices=mlp --calibrate=pydocs | --learning_rate=3e-4
0.58M ours: kron_decompose.py --budget=579.4K --calibrate=pydocs | --learning_rate=3e-4
0.58M ours, distilled: kron_decompose.py --budget=579.4K --calibrate=pydocs | --teacher={base} --learning_rate=1e-3
0.25M SVD of all matrices: experiments/peers.py even_ranks 247.7K | --learning_rate=1e-3
0.25M activation-aware SVD, even ranks: experiments/peers.py even_ranks 247.7K --calibrate=pydocs | --learning_rate=1e-3
0.25M one block in four: prune.py --dim=layer --keep=4 | --learning_rate=1e-3
0.25M ours: kron_decompose.py --budget=247.7K --calibrate=pydocs | --learning_rate=3e-4
0.25M ours, distilled: kron_decompose.py --budget=247.7K --calibrate=pydocs | --teacher={base} --learning_rate=1e-3
"""
