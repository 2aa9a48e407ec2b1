import pytest

from tdlrt_lab.reports.collect import collect
from tdlrt_lab.reports.groups import sections
from tdlrt_lab.reports.tables import latex_table, markdown_table


@pytest.fixture
def section(sweep):
    return sections(collect(sweep)[0])[0]


def test_markdown_marks_the_best_compressed_rows(section):
    lines = markdown_table(section).splitlines()
    assert lines[0].startswith("| method | accuracy (%) | compression (%) | network (%) |")
    assert "latency" not in lines[0]
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in lines[2:]}
    assert lines[0].endswith("| seeds |")
    assert rows["dense"][:2] == ["95.50 ± 0.71", "0.0"]
    assert rows["dense"][-1] == "2 |"
    assert rows["tdlrt, tau 0.1"][:2] == ["**93.50 ± 0.71**", "60.0"]
    assert rows["tdlrt, tau 0.2"][:2] == ["<ins>92.50 ± 0.71</ins>", "70.0"]
    assert rows["tucker"][:2] == ["91.00", "60.0"]


def test_latex_uses_booktabs_and_escapes(section):
    text = latex_table(section)
    assert text.startswith("\\begin{tabular}{lrrrrrrr}\n\\toprule\n")
    assert r"method & accuracy (\%)" in text
    assert r"tdlrt, tau 0.1 & \textbf{93.50 $\pm$ 0.71} & 60.0" in text
    assert r"\underline{92.50 $\pm$ 0.71}" in text
    dense = text[: text.index("tdlrt")]
    assert dense.count("\\midrule") == 2  # one below the titles, one below dense
    assert text.endswith("\\bottomrule\n\\end{tabular}")


def test_special_letters_in_latex(write_run, tmp_path):
    ranks = ({"conv_1": 0.5, "*": 0.3}, {"conv2": 0.5, "fc~1": 0.1})
    for number, rank in enumerate(ranks):
        write_run(f"r{number}", method="tucker", rank=rank, compression=0.5)
    text = latex_table(sections(collect(tmp_path)[0])[0])
    assert r"conv\_1=0.5" in text
    assert r"fc\textasciitilde{}1" in text


def test_latency_has_a_column_once_it_is_measured(section):
    for run in section.groups[1].runs:
        run.summary["latency_ms"] = 1.25
    lines = markdown_table(section).splitlines()
    assert lines[0].endswith("| latency (ms) | seeds |")
    assert lines[3].endswith("| 1.250 | 2 |")
    assert lines[2].endswith("|  | 2 |")


def test_of_text_the_fewest_bits_per_character_are_best(write_run, tmp_path):
    text = {"model": "gpt", "data": "stdlib"}
    write_run("dense", method="dense", bits=2.0, accuracy=55.0, **text)
    write_run("small", budget=0.1, bits=2.5, accuracy=51.0, compression=0.9, **text)
    write_run("large", budget=0.5, bits=2.25, accuracy=50.0, compression=0.5, **text)
    (section,) = sections(collect(tmp_path)[0])
    lines = markdown_table(section).splitlines()
    assert lines[0].startswith("| method | bits per character | accuracy (%) |")
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:3] for line in lines[2:]}
    assert rows == {
        "dense": ["2.000", "55.00"],
        "tdlrt, budget 0.5": ["**2.250**", "50.00"],
        "tdlrt, budget 0.1": ["<ins>2.500</ins>", "51.00"],
    }
