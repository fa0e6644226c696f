"""experiments/figures.py: the rewriting of tables, the numbers in them, and every picture on tiny inputs."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_tokens

from experiments import figures
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
    def row(name, parameters, loss, shapes, **widths):
        runs = [dict(after=loss - 0.1 - seed / 100) for seed in range(seeds)]
        usual = dict(head_qk=[[16]] * 2, head_v=[[16]] * 2, n_inner=[64] * 2, wte=[[256, 16]], wpe=[[16, 16]])
        return dict(name=name, parameters=parameters, before=loss, shapes=shapes, widths=usual | widths,
                    runs=runs, learning_rate=3e-4)

    dense = {kind: [[m, n, 1]] * 2 for kind, (m, n) in TINY.sizes(0).items()}
    low = {kind: [[m, 1, 2], [m, 1, 3]] for kind, (m, n) in TINY.sizes(0).items()}
    base = row("dense base", 4000, 1.5, dense)
    base.pop("runs")
    base.pop("learning_rate")
    narrow = dict(head_qk=[[5], [6]], head_v=[[7], [8]], n_inner=[32, 48], wte=[[128, 9], [128, 2]], wpe=[[16, 4]])
    return [base, row("dense, trained further", 4000, 1.5, dense),
            row("1K Van Loan", 1000, 3.5, low), row("1K ours", 1000, 1.75, low, **narrow),
            row("2K Van Loan", 2000, 2.5, low), row("2K ours", 2000, 1.625, dense)]


def test_tables_are_replaced_between_their_markers_and_a_second_time_changes_nothing():
    new = figures.rewrite(TEXT, dict(one="| a |\n|---|\n| 1 |", two=None))
    assert new == TEXT.replace("\nold\n", "\n\n| a |\n|---|\n| 1 |\n\n")
    assert figures.rewrite(new, dict(one="| a |\n|---|\n| 1 |\n", two=None)) == new
    assert figures.rewrite(TEXT, dict(one=None, two=None)) == TEXT


@pytest.mark.parametrize("text, tables, message", [
    (TEXT, "one", "tables .'two'"), (TEXT, "one two three", "tables .'three'"),
    (TEXT.replace("<!-- end -->", "", 1), "one two", "tables .'one'")])
def test_a_table_without_a_marker_or_an_end_is_an_error_and_nothing_is_written(text, tables, message, workdir):
    Path("a.md").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        figures.rewrite_documents(["a.md"], dict.fromkeys(tables.split(), "x"))
    assert Path("a.md").read_text(encoding="utf-8") == text


def test_the_appendix_has_the_records_of_the_runs():
    text = Path(ROOT, "docs/learning_rates.md").read_text(encoding="utf-8")
    records = json.loads(Path(ROOT, "docs/runs.json").read_text(encoding="utf-8"))
    names = {match[1] for match in figures.TABLE.finditer(text)}
    assert figures.rewrite(text, dict.fromkeys(names) | dict(runs=figures.runs_table(records))) == text
    assert records.keys() <= figures.RUNS.keys()


def test_parameters_are_those_of_the_model():
    parts = {name: int(number.replace(",", "")) for name, number, _ in cells(figures.parameters_table(TINY))}
    assert parts["mlp.c_fc"] == 2 * 16 * 64 and parts["token embedding = output matrix"] == 256 * 16
    total = parts.pop("in all")
    assert sum(parts.values()) == total == sum(p.numel() for p in KronyGPT(TINY).parameters())


def test_costs_of_shapes():
    dense, low_rank, one = cells(figures.shapes_table(16, 64, [(16, 64, 1), (16, 1, 3), (16, 16, 1)]))
    assert dense == ["(16, 64, 1)", "1,024", "100.0%", "16", "", "", "1.00", ""]
    assert low_rank[:5] == ["(16, 1, 3)", "231", "22.6%", "3", "0.23"]
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
    rows = cells(figures.shown(figures.comparison_table(compared)))
    assert rows[0] == ["dense base", "4,000", "1.500", ""]
    assert rows[3] == ["1K KronyGPT", "1,000", "1.750", f"1.645 ± {0.01 / math.sqrt(2):.3f}"]
    compared[1]["learning_rate"] = 3e-5
    assert [row[4] for row in cells(figures.comparison_table(compared))] == ["", "3e-05", *["0.0003"] * 4]
    assert figures.comparison_table(comparison(1)).endswith("1 seed.") and "±" not in figures.comparison_table(comparison(1))


def test_peers_of_a_size_are_sorted_by_their_loss(monkeypatch):
    monkeypatch.setattr(figures, "HEADLINE_SIZE", "1K")
    rows = comparison()
    rows.append(dict(rows[3], name="1K better", runs=[dict(after=1.25)]))
    table = cells(figures.peers_table(rows))
    assert [row[0] for row in table] == ["dense, trained further", "better", "KronyGPT", "Van Loan"]
    assert table[1] == ["better", "1,000", "1.750", "1.250"]


def test_methods_by_size():
    rows = comparison(1)
    del rows[4]
    table = figures.sizes_table(rows)
    assert table.startswith("| method | 2K (50%) | 1K (25%) |")
    assert cells(table) == [["Van Loan", "", "3.500 → 3.400"], ["KronyGPT", "1.625 → 1.525", "1.750 → 1.650"]]


def test_what_a_budget_chose(monkeypatch):
    monkeypatch.setattr(figures, "PLAN_SIZE", "2K")
    dense = figures.plan_table(comparison())
    assert cells(dense)[1] == ["1", "16", "16", "64", *["dense"] * 4] and dense.endswith("\n\nwte: dense; wpe: dense.")
    monkeypatch.setattr(figures, "PLAN_SIZE", "1K")
    table = figures.plan_table(comparison())
    assert cells(table) == [["0", "5", "7", "32", *["2"] * 4], ["1", "6", "8", "48", *["3"] * 4]]
    assert table.endswith("wte: 2 bands of 9, 2 columns; wpe: rank 4.")


def test_a_picture_is_the_same_each_time_and_small(workdir):
    spectra = figures.mean_spectra([torch.ones(8, 12), torch.eye(8, 12)], [(4, 3, 2), (8, 1, 3)])
    for draw, *data in ((figures.draw_spectrum, spectra), (figures.draw_added, comparison()),
                        (figures.draw_parts, comparison())):
        draw(*data, "a.png")
        draw(*data, "b.png")
        first = Path("a.png").read_bytes()
        assert first[:4] == b"\x89PNG" and len(first) < 150_000 and Path("b.png").read_bytes() == first


def document(path, names):
    Path(path).write_text("".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in names), encoding="utf-8")


def test_one_table_is_made_without_runs_and_those_without_their_run_stay(workdir, monkeypatch, capsys):
    monkeypatch.setattr(figures, "ROOT", workdir)
    monkeypatch.setattr(figures, "DOCUMENTS", ["a.md"])
    monkeypatch.setattr(figures, "make", lambda name: pytest.fail(f"the run {name} was made"))
    document("a.md", figures.TABLES)
    monkeypatch.setattr(figures, "only", "kronecker")
    before = Path("a.md").read_text(encoding="utf-8")
    figures.main()
    assert Path("a.md").read_text(encoding="utf-8") == before
    assert "those of compare_kronecker stay" in capsys.readouterr().out
    Path("out/compare_kronecker").mkdir(parents=True)
    Path("out/compare_kronecker/results.json").write_text(json.dumps(comparison()), encoding="utf-8")
    figures.main()
    tables = dict.fromkeys(figures.TABLES) | dict(kronecker=figures.comparison_table(comparison()))
    assert Path("a.md").read_text(encoding="utf-8") == figures.rewrite(before, tables)
    monkeypatch.setattr(figures, "only", "none")
    with pytest.raises(UserError, match="--only is one of"):
        figures.main()
