"""experiments/figures.py: the rewriting of tables, the numbers in them, and every picture on tiny inputs."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_tokens

from experiments import figures
from kronygpt.budget import shapes_within
from kronygpt.configurator import UserError
from model import KronyGPT, KronyGPTConfig, mlp_shapes

TEXT = "# A\n\n<!-- table: one -->\nold\n<!-- end -->\n\nbetween\n\n<!-- table: two -->\n<!-- end -->\nlast\n"
TINY = KronyGPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=1, n_embd=16)


def cells(table):
    """The cells of a Markdown table, without the lines of its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def comparison(seeds=2):
    """Rows as compare.py writes them: the dense model, the same trained further, and two methods at two sizes."""
    def row(name, parameters, loss, shapes):
        runs = [dict(after=loss - 0.1 - seed / 100, seconds=3.0, curve=[[0, loss]]) for seed in range(seeds)]
        return dict(name=name, parameters=parameters, before=loss, shapes=shapes, seconds=2.0, runs=runs, learning_rate=3e-4)

    dense = {kind: [[m, n, 1]] * 2 for kind, (m, n) in TINY.sizes(0).items()}
    low = {kind: [[m, 1, 2], [m, 1, 3]] for kind, (m, n) in TINY.sizes(0).items()}
    base = row("dense base", 4000, 1.5, dense)
    base.pop("runs")
    base.pop("learning_rate")
    return [base, row("dense, trained further", 4000, 1.5, dense), row("1K Van Loan", 1000, 3.5, low),
            row("1K ours", 1000, 1.75, low), row("2K Van Loan", 2000, 2.5, low), row("2K ours", 2000, 1.625, dense)]


def test_tables_are_replaced_between_their_markers_and_a_second_time_changes_nothing():
    new = figures.rewrite(TEXT, dict(one="| a |\n|---|\n| 1 |", two=None))
    assert new == TEXT.replace("\nold\n", "\n\n| a |\n|---|\n| 1 |\n\n")
    assert figures.rewrite(new, dict(one="| a |\n|---|\n| 1 |\n", two=None)) == new
    assert figures.rewrite(TEXT, dict(one=None, two=None)) == TEXT


@pytest.mark.parametrize("text, tables, message", [
    (TEXT, "one", "tables .'two'"), (TEXT, "one two three", "tables .'three'"),
    (TEXT[:-18], "one two", "a.md has a marker .* without")])
def test_a_table_without_a_marker_or_an_end_is_an_error_and_nothing_is_written(text, tables, message, workdir):
    Path("a.md").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        figures.rewrite_documents(["a.md"], dict.fromkeys(tables.split(), "x"))
    assert Path("a.md").read_text(encoding="utf-8") == text


def test_the_report_has_the_records_of_the_runs():
    text = Path(ROOT, "docs/report.md").read_text(encoding="utf-8")
    records = json.loads(Path(ROOT, "docs/runs.json").read_text(encoding="utf-8"))
    names = {match[1] for match in figures.TABLE.finditer(text)}
    assert figures.rewrite(text, dict.fromkeys(names) | dict(runs=figures.runs_table(records))) == text
    assert records.keys() <= figures.RUNS.keys()


def test_parameters_are_those_of_the_model():
    parts = figures.parameters_by_part(TINY)
    model = KronyGPT(TINY)
    assert parts["mlp.c_fc"] == 2 * 16 * 64 and parts["token embedding = output matrix"] == 256 * 16
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert "| in all | " + f"{sum(parts.values()):,} | 100.0% |" in figures.parameters_table(TINY)


def test_costs_of_shapes():
    dense, low_rank, one = cells(figures.shapes_table(16, 64, [(16, 64, 1), (16, 1, 3), (16, 16, 1)]))
    assert dense == ["(16, 64, 1)", "1,024", "100.0%", "16", "", "", "1.00", ""]
    assert low_rank[:5] == ["(16, 1, 3)", "240", "23.4%", "3", "0.23"]
    assert one[1] == "260" and one[3] == "16" and one[4] == f"{(256 + 64) / 1024:.2f}"


def test_multiply_adds_of_a_step_are_those_that_the_model_counts():
    sizes = dict(block_size=4096, vocab_size=4096, n_layer=2, n_head=1, n_embd=256)
    configs = dict(dense=KronyGPTConfig(**sizes), half=KronyGPTConfig(**sizes, shapes=mlp_shapes(256, 512, [1, 1])))
    for (_, *numbers), config in zip(cells(figures.step_table(configs)), configs.values()):
        assert float(numbers[-1]) == pytest.approx(figures.empty_model(config).flops_per_token() / 6e6, abs=0.06)
        assert [float(numbers[i]) for i in (0, 2, 3)] == [0.5, 4.2, 1.0]
        assert float(numbers[-1]) == pytest.approx(sum(map(float, numbers[:-1])), abs=0.21)


def test_spectra_are_singular_values_of_the_blocks():
    matrices = [torch.randn(8, 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    (trained, random), = figures.mean_spectra(matrices, [(4, 3, 2)]).values()
    expected = []
    for W in matrices:
        blocks = [W[2 * i:2 * i + 2, 4 * j:4 * j + 4].flatten() for i in range(4) for j in range(3)]
        expected.append(np.linalg.svd(torch.stack(blocks).numpy(), compute_uv=False) / W.norm().item())
    assert trained.numpy() == pytest.approx(np.mean(expected, axis=0), abs=1e-6)
    assert random.square().sum() == pytest.approx(1, abs=0.1) and len(random) == 8
    (_, n, kept, _), = cells(figures.spectrum_table({(4, 3, 2): (trained, random)}))
    assert n == "8" and float(kept[:-1]) == pytest.approx(100 * trained[:2].square().sum().item(), abs=0.05)


def test_errors_of_the_fits():
    torch.manual_seed(0)
    model = KronyGPT(TINY)
    for p in model.parameters():
        p.data.mul_(4)
    text, tokens = random_tokens(32, 16), np.random.default_rng(0).integers(256, size=129)
    held_out = [(begin, begin + 1, begin + 16) for begin in range(0, 128, 16)]
    dense, fitted = cells(figures.errors_table(model, text, tokens, held_out, [(16, 1, 4)]))
    windows = torch.from_numpy(tokens[:128]).view(8, 16)
    with torch.no_grad():
        logits = model(windows)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()
    assert dense[0] == "dense" and float(dense[3]) == pytest.approx(loss, abs=6e-4)
    weights, outputs = ([float(number) for number in cell.split(" → ")] for cell in fitted[1:3])
    assert 0 < weights[0] < weights[1] and 0 < outputs[1] < outputs[0]
    before, after = (float(number) for number in fitted[3].split(" → "))
    assert before != after


def test_a_comparison_has_the_mean_and_the_spread_of_its_seeds():
    compared = comparison()
    rows = cells(figures.comparison_table(compared))
    assert rows[0] == ["dense base", "4,000", "1.500", ""]
    assert rows[3] == ["1K ours", "1,000", "1.750", f"1.645 ± {0.01 / math.sqrt(2):.3f}"]
    compared[1]["learning_rate"] = 3e-5
    assert [row[4] for row in cells(figures.comparison_table(compared))] == ["", "3e-05", *["0.0003"] * 4]
    assert figures.comparison_table(comparison(1)).endswith("1 seed.") and "±" not in figures.comparison_table(comparison(1))


def test_peers_of_a_size_are_sorted_by_their_loss():
    rows = comparison()
    rows.append(dict(rows[3], name="1K better", runs=[dict(after=1.25)]))
    table = cells(figures.peers_table(rows, "1K"))
    assert [row[0] for row in table] == ["dense, trained further", "better", "ours", "Van Loan"]
    assert table[1] == ["better", "1,000", "1.750", "1.250"]


def test_ranks_of_the_budgets():
    budgets = figures.our_budgets(comparison())
    assert list(budgets) == ["2K", "1K"] and figures.matrices_of(comparison()) == TINY.sizes(0)
    rows = cells(figures.ranks_table(comparison()))
    assert rows[4] == ["1K", "attn.c_attn", f"2 ({2 * 64 / 768:.0%})", f"3 ({3 * 64 / 768:.0%})"]
    assert rows[3] == ["2K", "mlp.c_proj", "dense", "dense"]
    assert figures.rank_share(16, 64, (16, 16, 1)) == (256 + 4) / 1024 and figures.rank_share(16, 64, (16, 64, 1)) == 1


def test_a_picture_is_the_same_each_time_and_small(workdir):
    spectra = figures.mean_spectra([torch.ones(8, 12), torch.eye(8, 12)], [(4, 3, 2), (8, 1, 3)])
    shapes = shapes_within(KronyGPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=1, n_embd=16), 3000, 3700)
    for draw, data in ((figures.draw_parameters, TINY), (figures.draw_spectrum, spectra), (figures.draw_cost, shapes),
                       (figures.draw_ranks, comparison())):
        draw(data, "a.png")
        draw(data, "b.png")
        first = Path("a.png").read_bytes()
        assert first[:4] == b"\x89PNG" and len(first) < 150_000 and Path("b.png").read_bytes() == first
