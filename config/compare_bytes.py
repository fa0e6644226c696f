# Starts at a quarter and at half of the MLP parameters, for a GPT-2 over bytes of 4 layers, 256 wide, in Hugging Face
# format. The first start is the base itself, (C, 4C, 1), which shows what further training alone gains.
base = "../shared/data/gpt2-bytes"
train_config = "config/compare_bytes_train.py"
dataset = "pydocs"
out_dir = "out/compare_bytes"
learning_rates = "1e-4,3e-4,6e-4"

starts = f"""
dense, trained further: kron_decompose.py 256 1024 1
Van Loan (256, 256, 1): kron_decompose.py 256 256 1
calibrated (256, 256, 1): kron_decompose.py 256 256 1 --calibrate=pydocs
Van Loan (128, 32, 16): kron_decompose.py 128 32 16
calibrated (128, 32, 16): kron_decompose.py 128 32 16 --calibrate=pydocs
SVD (256, 1, 51): kron_decompose.py 256 1 51
calibrated (256, 1, 51): kron_decompose.py 256 1 51 --calibrate=pydocs
a quarter of the hidden units, refitted: prune.py --dim=hidden --keep=4 --select=contribution --refit --calibrate=pydocs
one block in four: prune.py --dim=layer --keep=4
distilled (256, 1, 51), equal steps: kron_decompose.py 256 1 51 --calibrate=pydocs | --teacher={base}
distilled (256, 1, 51), equal time: kron_decompose.py 256 1 51 --calibrate=pydocs | --teacher={base} --max_iters=215
budget search, a quarter: kron_decompose.py --budget=1.718M --calibrate=pydocs
even rows kept: prune.py
Van Loan (256, 512, 1): kron_decompose.py 256 512 1
calibrated (256, 512, 1): kron_decompose.py 256 512 1 --calibrate=pydocs
SVD (256, 1, 102): kron_decompose.py 256 1 102
calibrated (256, 1, 102): kron_decompose.py 256 1 102 --calibrate=pydocs
half of the hidden units, refitted: prune.py --dim=hidden --keep=2 --select=contribution --refit --calibrate=pydocs
one block in two: prune.py --dim=layer
budget search, half: kron_decompose.py --budget=2.2425M --calibrate=pydocs
"""
