"""The documentation against the code: its programs run, its links lead somewhere, its tables are complete and right."""

import re
from pathlib import Path

import pytest
import torch
from _helpers import brief
from torch import nn

from fastvae import functional as FV
from fastvae import info

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

B, D, LATENT = 128, 784, 20
# How a script reduces a term, and by which factor that differs from nats per sample.
RECONSTRUCTION_FACTORS = {"sum": B, "batchmean": 1, "mean": 1 / D}
KL_FACTORS = {"sum": B, "batchmean": 1, "mean": 1 / LATENT}
WORDS = {
    "sum": "sum",
    "sum over the batch": "sum",
    "nats per sample": "batchmean",
    "mean over elements": "mean",
}


def programs(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))


def posterior() -> dict:
    """The names that a training loop has at hand."""
    torch.manual_seed(0)
    x = torch.rand(B, 1, 28, 28)
    decoder = nn.Sequential(nn.Linear(LATENT, D), nn.Unflatten(1, (1, 28, 28)))
    mu, logvar = torch.randn(B, LATENT), torch.randn(B, LATENT)
    return {"x": x, "recon": torch.rand_like(x), "mu": mu, "logvar": logvar, "decoder": decoder}


WITH_PROGRAMS = {str(page.relative_to(ROOT)): page for page in PAGES if programs(page)}


# The page about deployment exports to ONNX and compiles ahead of time.
@pytest.mark.parametrize("page", brief(WITH_PROGRAMS, WITH_PROGRAMS.keys() - {"docs/deployment.md"}))
def test_programs_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = posterior()
    exec(compile(programs(page), page.name, "exec"), names)
    assert len(names) > len(posterior())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())
    for link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path
        assert target.is_file(), link
        assert not heading or heading in headings(target), link


def headings(page: Path) -> list[str]:
    """The names under which a page's headings can be linked to."""
    lines = [line for line in page.read_text().splitlines() if line[:1] == "#"]
    return [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines]


def test_every_environment_variable_has_its_row():
    table = (ROOT / "docs/backends.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)` \| (?:at|by) ", table, re.MULTILINE))
    sources = [ROOT / "setup.py", *(ROOT / "fastvae").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r'environ(?:\.get\(|\[)"(\w+)"', path.read_text())}
    assert read | set(info.ENVIRONMENT) == documented


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_have_six_columns_at_most(page):
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) <= 7 for row in rows)


# A number with the unit of a time, a rate or an amount of memory, a multiple, or a share.
FIGURE = re.compile(r"\b\d[\d.,]*(?: ?(?:[nmµu]?s|[KMG]i?B|[KMGT]?(?:B|FLOP)/s)|x)\b|\b\d[\d.,]* ?%")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_measured_figure_is_typed_by_hand(page):
    text = re.sub(r"<!-- benchmarks:begin -->.*<!-- benchmarks:end -->|^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert [match[0] for match in FIGURE.finditer(text)] == []


def rows_of_the_weight_table() -> list[tuple[str, str, float]]:
    text = (ROOT / "docs/losses.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [(row[0], row[1], float(row[3])) for row in cells if len(row) == 4 and row[0] in WORDS and row[1] in WORDS]


@pytest.mark.parametrize(("reconstruction", "kl", "beta"), rows_of_the_weight_table())
def test_weights_of_the_conversion_table(reconstruction, kl, beta):
    """The scripts' objective is the negative evidence lower bound with the table's beta, times a factor."""
    names = posterior()
    x, recon, mu, logvar = (names[name] for name in ("x", "recon", "mu", "logvar"))
    script = FV.binary_cross_entropy(recon, x, reduction=WORDS[reconstruction]) + FV.kl_normal(mu, logvar, reduction=WORDS[kl])
    assert beta == pytest.approx(KL_FACTORS[WORDS[kl]] / RECONSTRUCTION_FACTORS[WORDS[reconstruction]])
    elbo = FV.elbo_loss(recon, x, mu, logvar, likelihood="bernoulli", beta=beta).loss
    torch.testing.assert_close(script, elbo * RECONSTRUCTION_FACTORS[WORDS[reconstruction]], rtol=1e-5, atol=0)


def test_the_conversion_table_was_found():
    assert len(rows_of_the_weight_table()) == 8


def test_the_example_of_a_squared_error():
    """The two objectives of docs/losses.md differ by a factor and a constant: their differences between two posteriors do by the factor."""
    names = posterior()
    names["x"], names["recon"] = torch.rand(2, B, 3, 8, 8)

    def objectives(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        scope = names | {"recon": names["recon"] * scale, "mu": names["mu"] * scale}
        exec(compile(programs(ROOT / "docs/losses.md"), "losses.md", "exec"), scope)
        return scope["weighted"].double(), scope["elbo"].loss.double()

    (weighted, elbo), (other_weighted, other_elbo) = objectives(1.0), objectives(0.5)
    factor = 2 / names["x"][0].numel()
    torch.testing.assert_close(other_weighted - weighted, (other_elbo - elbo) * factor, rtol=1e-4, atol=0)
