"""The benchmark suite: every case's providers agree, a wrong one is caught, and figures survive the way into tables and floors."""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _helpers import brief

from benchmarks import __main__ as command
from benchmarks import devices, floors, headline, largest_batch, plots, registry, report, results, tables, units
from benchmarks.registry import Case, Inputs, Unavailable, WrongResult, forward_backward
from benchmarks.runner import WRONG, Plan, checked_contenders, measure

ROOT = Path(__file__).parents[1]
CPU = devices.Cpu()
CASES = registry.all_cases()
BRIEF = Plan(seconds=0.0, fewest_rounds=2, most_rounds=2)


def square(x):
    return (x * x).sum()


def wrong_gradient(x):
    return (x * x.detach()).sum()


def wrong_value(x):
    return square(x) + 1


def missing(inputs):
    raise Unavailable("peer is not installed")


def make_case(**providers) -> Case:
    given = {"eager": forward_backward(square), "fastvae": forward_backward(square)}
    return Case(
        family="latent",
        name="square",
        size=(40, 25),
        tiny=(2, 3),
        setup=lambda size, dtype, device: Inputs({"x": torch.randn(size, dtype=dtype, device=device, requires_grad=True)}),
        providers=given | providers,
        outputs=("loss",),
        work=lambda inputs: 2 * inputs.leaves["x"].nbytes,
    )


def make_figure(**changes) -> results.Figure:
    values = {
        "timestamp": "2026-01-02T00:00:00+00:00",
        "device": "cpu",
        "device_name": CPU.name,
        "features": " ".join(CPU.features),
        "threads": 2,
        "instruction_set": "avx2",
        "backend": "cpp",
        "fastvae": "0.1.0",
        "torch": "2.13.0",
        "triton": "",
        "family": "reconstruction",
        "case": "mse_loss-128x784-float32",
        "size": "128x784",
        "dtype": "float32",
        "provider": "fastvae",
        "mode": "launch",
        "median_ms": 0.25,
        "p20_ms": 0.125,
        "p80_ms": 0.5,
        "ratio": 1.0,
        "rate": 4.0,
        "roof_rate": 16.0,
        "rate_unit": "GB/s",
        "first_call_s": 0.5,
        "peak_memory_mb": 2.0,
        "rounds": 20,
        "calls_per_round": 3,
        "remark": "",
    }
    return results.Figure(**values | changes)


FIGURES = [make_figure(), make_figure(provider="eager", median_ms=0.375, p80_ms=1.0, ratio=1.5, peak_memory_mb=4.0)]


def test_ids_are_unique_and_floors_name_cases_of_the_families_there():
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids)
    floored = {floor["case"] for section in floors.load().values() for floor in section["floors"]}
    assert {"reparameterize_kl-8192x128-float32", "mse_loss-128x784-float32"} <= floored & set(ids)


@pytest.mark.parametrize("family", registry.families())
def test_every_operator_has_a_quick_case_and_each_family_declares_itself(family):
    # Models take minutes to compile.
    assert any(case.quick for case in registry.cases(family)) == (ROOT / "fastvae" / "functional" / f"{family}.py").is_file()
    assert {case.family for case in registry.cases(family)} == {family}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_providers_agree(case):
    tiny = dataclasses.replace(case, size=case.tiny)
    eager = {name: provider for name, provider in tiny.providers.items() if "compile" not in name}
    contenders, absent = checked_contenders(tiny, CPU, eager)
    # The cost of a training loop is compared with that of another loop, and not with operators.
    baselines = {"bare-loop"} if case.family == "training" else {"eager", "compile"}
    assert {*baselines, "fastvae"} <= set(case.providers)
    assert set(contenders) | set(absent) == set(eager)
    assert not [reason for reason in absent.values() if reason.startswith(WRONG)]
    assert case.work(contenders["fastvae"].inputs[0]) > 0


def test_compiled_provider_agrees():
    case = next(case for case in CASES if case.name == "mse_loss")
    contenders, absent = checked_contenders(dataclasses.replace(case, size=case.tiny), CPU, ("eager", "compile"))
    assert set(contenders) == {"eager", "compile"}
    assert not absent


@pytest.mark.parametrize(("wrong", "named"), [(wrong_gradient, "grad x"), (wrong_value, "loss")])
def test_wrong_kernel_is_caught_before_anything_is_timed(wrong, named):
    case = make_case(fastvae=forward_backward(wrong))
    with pytest.raises(WrongResult, match=f"fastvae: {named} is not that of the first provider"):
        measure(case, CPU, BRIEF)


@pytest.mark.parametrize(("wrong", "named"), [(wrong_gradient, "grad x"), (wrong_value, "loss")])
def test_wrong_peer_is_left_out_and_named(wrong, named):
    measurement = measure(make_case(peer=forward_backward(wrong)), CPU, BRIEF)
    assert set(measurement.timings["launch"]) == {"eager", "fastvae"}
    assert measurement.absent["peer"].startswith(f"{WRONG}: peer: {named} is not that of the first provider")


def test_nan_is_a_wrong_result():
    case = make_case(fastvae=forward_backward(lambda x: square(x) * float("nan")))
    with pytest.raises(WrongResult, match="fastvae: loss"):
        measure(case, CPU, BRIEF)


def test_remark_goes_with_the_figures_of_the_kernels():
    case = dataclasses.replace(make_case(), remark=lambda operation: f"loss of dimension {operation().ndim}")
    rows = results.figures(results.describe_run(CPU), measure(case, CPU, BRIEF))
    assert {row.provider: row.remark for row in rows} == {"eager": "", "fastvae": "loss of dimension 0"}


def test_noise_that_is_not_standard_normal_is_caught():
    case = next(case for case in registry.cases("latent"))
    doubled = {"fastvae": forward_backward(lambda mu, logvar: _sample_twice_as_wide(mu, logvar))}
    with pytest.raises(WrongResult, match="variance"):
        checked_contenders(dataclasses.replace(case, size=(100, 20), providers=doubled), CPU, doubled)


def _sample_twice_as_wide(mu, logvar):
    return mu + 2 * torch.exp(0.5 * logvar) * torch.randn_like(mu), (mu + logvar).sum()


def test_absent_provider_is_reported_with_its_reason():
    measurement = measure(make_case(peer=missing), CPU, BRIEF)
    assert measurement.absent == {"peer": "peer is not installed"}
    assert set(measurement.timings["launch"]) == {"eager", "fastvae"}


class WithReference(devices.Cpu):
    backends = ("reference", "cuda")


def test_backends_are_measured_one_against_the_other():
    case = next(case for case in CASES if case.name == "mse_loss")
    providers = {name: case.providers[name] for name in ("eager", "fastvae")}
    case = dataclasses.replace(case, size=case.tiny, providers=providers)
    measurement = measure(case, WithReference(), BRIEF)
    assert set(measurement.timings["launch"]) == {"eager", "fastvae", "fastvae-reference"}
    assert "backend 'cuda' cannot serve" in measurement.absent["fastvae-cuda"]
    rows = results.figures(results.describe_run(CPU), measurement)
    assert "| `fastvae-reference` | " in "\n".join(tables._tables([case], rows))


def test_case_without_fastvae_fails():
    with pytest.raises(Unavailable):
        measure(make_case(fastvae=missing), CPU, BRIEF)


def test_peak_memory_counts_what_a_call_holds_at_once():
    def operation():
        first = torch.ones(1 << 18)
        del first
        second = torch.ones(1 << 19)
        return second + 1

    # The scalars of the arithmetic are a few bytes more.
    assert 0 <= CPU.peak_memory(operation) - 2 * (1 << 19) * 4 < 1024


def test_inputs_are_the_same_for_every_provider():
    first, second = (CASES[0].make_inputs(CPU.device) for _ in range(2))
    torch.testing.assert_close(first.leaves, second.leaves, rtol=0, atol=0)


def test_run_writes_rows_and_fails_with_a_failing_case(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "FULL", BRIEF)
    monkeypatch.setattr(registry, "cases", lambda family: (make_case(), make_case(fastvae=forward_backward(wrong_value))))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "restored afterwards")
    out = tmp_path / "figures.csv"
    assert command.main(["latent", "--device", "cpu", "--out", str(out)]) == 1
    assert [row.provider for row in results.read(out)] == ["eager", "fastvae"]
    assert "FAILED latent square-40x25-float32: fastvae: loss" in capsys.readouterr().err


def test_figures_survive_the_file(tmp_path):
    path = tmp_path / "figures.csv"
    results.append(path, FIGURES[:1])
    results.append(path, FIGURES[1:])
    assert results.read_all(tmp_path) == FIGURES


def test_result_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "figures.csv"
    path.write_text("case,median\na,1\n")
    with pytest.raises(ValueError, match="its columns are"):
        results.append(path, FIGURES)


def test_newest_run_wins():
    older = make_figure(timestamp="2025-12-31T00:00:00+00:00", median_ms=9.0)
    assert results.newest([*FIGURES, older]) == FIGURES
    assert results.newest([make_figure(threads=4), *FIGURES]) == [make_figure(threads=4), *FIGURES]


def test_file_name_carries_the_device():
    assert results.device_slug("cpu", "Intel(R) Xeon(R) Gold 6430 @ 2.1GHz", ["avx2"], 2) == "cpu-intel-xeon-gold-6430-avx2-2threads"
    assert results.device_slug("cpu", "AMD EPYC 9B14 96-Core Processor", [], 4) == "cpu-amd-epyc-9b14-96-core-4threads"
    assert results.device_slug("cuda", "NVIDIA H200", (), 16) == "cuda-nvidia-h200"


@pytest.mark.parametrize(
    ("flags", "features", "slug"),
    [
        ("fpu sse2", (), "cpu-intel-xeon-2threads"),
        ("avx2 avx512f avx512_vnni", ("avx2", "avx512", "avx512_vnni"), "cpu-intel-xeon-avx512_vnni-2threads"),
        (
            "avx2 avx512f avx512_bf16 avx512_vnni amx_bf16 amx_tile",
            ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"),
            "cpu-intel-xeon-avx512_bf16-amx-2threads",
        ),
    ],
)
def test_processors_of_one_name_have_files_of_their_own(monkeypatch, flags, features, slug):
    described = {"model name": "Intel(R) Xeon(R) Processor", "flags": flags}
    monkeypatch.setattr(devices, "_cpuinfo", described.__getitem__)
    assert devices.Cpu().features == features
    assert results.device_slug("cpu", devices.Cpu().name, devices.Cpu().features, 2) == slug


def test_stored_files_are_named_after_what_they_hold():
    stored = {path.stem: {row.slug for row in results.read(path)} for path in results.DIRECTORY.glob("*.csv")}
    assert stored
    assert all(slugs == {stem} for stem, slugs in stored.items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.time(1790.0), "1.79 s"),
        (units.time(999.6), "1.00 s"),
        (units.time(36.04), "36.0 ms"),
        (units.time(0.0821), "82.1 µs"),
        (units.memory(4098.0), "4.00 GiB"),
        (units.memory(1010.4), "1010 MiB"),
        (units.memory(0.0390701), "40.0 KiB"),
        (units.memory(0.0), "0 B"),
        (units.ratio(0.0123), "0.0123x"),
        (units.ratio(9.996), "10.0x"),
        (units.ratio(12345.6), "12346x"),
        (units.rate(0.0515, "GB/s"), "51.5 MB/s"),
        (units.rate(1200.0, "GFLOP/s"), "1.20 TFLOP/s"),
        (units.share(1.18), "118%"),
        (units.share(0.0004), "under 1%"),
    ],
)
def test_figures_have_three_digits_and_no_exponent(text, expected):
    assert text == expected


def test_tables_hold_the_figures_and_say_what_was_not_measured():
    text = tables.page(FIGURES)
    processor = tables.describe_processor(FIGURES[0])
    assert f"### reconstruction: {processor}\n" in text
    assert "| provider | mse_loss (128, 784) float32 |\n| --- | --- |\n| `fastvae` | 250 µs |\n| `eager` | 375 µs (1.50x) |" in text
    assert "Not measured: `compile`" in text
    assert "| mse_loss (128, 784) float32 | 4.00 GB/s | 25% of a copy | 2.00 MiB | 4.00 MiB |" in text
    assert "| mse_loss (128, 784) float32 | 250 µs: eager 1.50x |" in text
    assert "| gaussian_nll (32, 3, 256, 256) float32 | not measured |" in text
    assert "## latent\n\nReparameterized sampling with the analytic KL divergence.\n\nNot measured." in text
    assert "GPUs: not measured." in text


def figures_of_every_case(**changes) -> list[results.Figure]:
    """Extreme figures of every provider, which grow from one to the next."""
    rows = []
    for case in CASES:
        values = {"family": case.family, "case": case.id, "size": case.size_name, "dtype": case.dtype_name, "rate_unit": f"G{case.unit}/s"}
        for index, provider in enumerate(case.providers):
            time = 10.0 ** (2 * index - 4)
            measured = {"provider": provider, "median_ms": time, "ratio": time * 1e4, "peak_memory_mb": time, "remark": "a remark"}
            rows.append(make_figure(**values | measured | changes))
    return rows


OTHER_PROCESSOR = {"device_name": "AMD EPYC 9B14 96-Core Processor", "features": "avx2 avx512", "timestamp": "2026-01-01T00:00:00+00:00"}
GPU = {"device": "cuda", "device_name": "NVIDIA H200", "features": ""}


def test_no_table_is_wider_than_six_columns_nor_has_exponents():
    figures = figures_of_every_case()
    figures += figures_of_every_case(**OTHER_PROCESSOR)
    figures += [row for mode in ("launch", "graph") for row in figures_of_every_case(**GPU, mode=mode)]
    for text in (tables.page(figures), tables.readme_section(figures)):
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert rows
        assert max(line.count(" | ") for line in rows) < 6
        assert not re.search(r"\de[+-]\d", text)


def test_processors_stand_side_by_side():
    text = tables.page([*FIGURES, *(dataclasses.replace(row, **OTHER_PROCESSOR) for row in FIGURES)])
    processor = tables.describe_processor(FIGURES[0])
    assert f"| case | AMD EPYC 9B14 96-Core (avx512), 2 threads | {processor} |" in text
    assert "| mse_loss (128, 784) float32 | 250 µs: eager 1.50x | 250 µs: eager 1.50x |" in text


@pytest.mark.parametrize(("features", "ratio", "explained"), [("avx2", 0.3, True), ("avx2", 1.2, False), ("avx512_bf16", 0.3, False)])
def test_slow_bfloat16_is_explained_where_the_processor_lacks_its_products(features, ratio, explained):
    values = {"family": "conv_vae", "case": "residual_vae_step-4x3x128x128-bfloat16", "dtype": "bfloat16", "features": features}
    rows = [make_figure(**values), make_figure(**values, provider="eager-fp32", ratio=ratio)]
    assert ("no instructions for products of bfloat16" in tables.page(rows)) == explained


def test_page_shows_the_profiles_that_were_drawn(tmp_path, monkeypatch):
    case = next(case for case in CASES if case.family == "conv_vae")
    row = make_figure(family="conv_vae", case=case.id)
    picture = tables.profile_name(row.slug, case.id)
    monkeypatch.setattr(tables, "DIRECTORY", tmp_path / "benchmarks" / "results")
    tables.DIRECTORY.mkdir(parents=True)
    assert picture not in tables.page([row])
    (tables.DIRECTORY / picture).touch()
    assert f"(../benchmarks/results/{picture})" in tables.page([row])


def test_readme_begins_with_the_newest_processor_on_which_all_four_were_measured():
    ours, other = figures_of_every_case(), figures_of_every_case(**OTHER_PROCESSOR)
    assert headline.of_processor([*ours, *other])[0].fastvae.slug == ours[0].slug
    rows = headline.of_processor([*other, *(row for row in ours if row.family != "codebook")])
    assert [row.fastvae.case for row in rows][-1] == "residual_vae_step-4x3x128x128-float32"
    assert {row.fastvae.slug for row in rows} == {other[0].slug}
    assert headline.of_processor(FIGURES) == []
    assert "not measured" in tables.readme_section(FIGURES)


def test_readme_has_the_step_in_bfloat16_where_the_processor_multiplies_it():
    rows = headline.of_processor(figures_of_every_case(features="avx2 avx512 avx512_vnni avx512_bf16"))
    assert rows[-1].fastvae.dtype == "bfloat16"


def test_readme_shows_the_fastest_variant_of_plain_pytorch():
    figures = figures_of_every_case()
    changed = [dataclasses.replace(row, median_ms=1e-5, ratio=0.5) if row.provider == "addmm" else row for row in figures]
    assert headline.of_processor(changed)[2].eager.provider == "addmm"
    assert "| 0.0100 µs (0.500x) `addmm` |" in tables.readme_section(changed)


def test_documents_are_what_the_stored_figures_say():
    assert report.main(["--check"]) == 0


def test_documents_are_written_once_and_checked(tmp_path, monkeypatch):
    written = {tmp_path / "README.md": tables.readme_section, tmp_path / "benchmarks.md": tables.page}
    for path in written:
        path.write_text(f"before\n{report.BEGIN}\nstale text\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "DOCUMENTS", written)
    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    monkeypatch.setattr(results, "read_all", lambda: FIGURES)
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    texts = [path.read_text() for path in written]
    assert report.main(["--check"]) == 0
    assert report.main([]) == 0
    assert [path.read_text() for path in written] == texts
    for text in texts:
        assert text.startswith("before\n<!-- benchmarks:begin -->\n")
        assert text.endswith("<!-- benchmarks:end -->\nafter\n")
        assert "stale text" not in text


def test_document_without_marks_is_refused():
    with pytest.raises(ValueError, match="benchmarks:begin"):
        report.inserted("no marks", "text")


def test_every_provider_and_case_is_explained():
    explained = set(re.findall(r"`([\w-]+)`", (ROOT / "docs" / "benchmarks.md").read_text().split(report.BEGIN)[0]))
    providers = {name for case in CASES for name in case.providers} | {f"fastvae-{backend}" for backend in devices.Cuda.backends}
    # The variant of a case is explained with the case, by what its name adds.
    variants = {"contractive_penalty_with_encoder": "..._with_encoder"}
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert providers <= explained
    assert all(case.name in explained or f"`{variants[case.name]}`" in text for case in CASES)


def test_a_picture_for_each_device_mode_and_family_and_one_for_the_readme(tmp_path):
    figures = [*FIGURES, *(make_figure(**GPU, mode=mode) for mode in ("launch", "graph"))]
    drawn = plots.draw(figures, tmp_path)
    assert len(drawn) == 3
    drawn += plots.draw(figures_of_every_case(), tmp_path)
    assert drawn[-1].name == "headline.png"
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_floors_name_what_falls_short(capsys):
    floor = {"case": "mse_loss-*", "at_least": {"eager": 2.0, "compile": 1.0}, "share_of_roof": 0.2}
    section = {"threads": 2, "mode": "launch", "floors": [floor]}
    found = {verdict.provider: verdict for verdict in floors.judge(FIGURES, {"cpu": section}, CPU)}
    assert found["eager"].falls_short
    assert found["eager"].measured == 1.5
    assert found["compile"].measured is None
    assert not found["compile"].falls_short
    assert found["share of the roof"].measured == 0.25
    assert report.hold_against_floors(FIGURES) == 0
    assert report.hold_against_floors([make_figure(provider="eager", ratio=0.5)]) == 1
    assert "0.50 FALLS SHORT" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"threads": 3}, {"device_name": "another"}, {"features": "none of ours"}])
def test_floors_pass_over_other_machines(change):
    floor = {"case": "*", "at_least": {"eager": 2.0}}
    stranger = dataclasses.replace(FIGURES[1], **change)
    verdicts = floors.judge([stranger], {"cpu": {"threads": 2, "mode": "launch", "floors": [floor]}}, CPU)
    assert [verdict.measured for verdict in verdicts] == [None]


@pytest.mark.parametrize(("features", "applies"), [(("avx2",), False), (("avx2", "avx512", "avx512_vnni", "avx512_bf16"), True)])
def test_floor_applies_where_the_processor_has_what_it_needs(features, applies):
    class Processor(devices.Cpu):
        pass

    Processor.features = features
    floor = {"case": "mse_loss-*", "at_least": {"eager": 2.0}, "needs": "avx512_bf16"}
    figure = dataclasses.replace(FIGURES[1], features=" ".join(features))
    (verdict,) = floors.judge([figure], {"cpu": {"threads": 2, "mode": "launch", "floors": [floor]}}, Processor())
    assert verdict.falls_short == applies
    assert str(verdict).endswith("1.50 FALLS SHORT" if applies else "1.50, not applicable: needs avx512_bf16")


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("bend", [0.0, 0.001, -0.001], ids=str)
def test_largest_batch(most, bend):
    """Also where memory does not grow in proportion."""

    def peak(batch):
        return int(1000 + 100 * batch + 100 * bend * batch**2)

    assert largest_batch.largest_batch(peak, peak(most)) == most


def test_a_larger_batch_fits_in_more_memory():
    case = next(case for case in CASES if case.name == "residual_vae_step")
    tiny = dataclasses.replace(case, size=case.tiny)
    peak = functools.partial(largest_batch.peak_memory, case.providers["fastvae-lean"], tiny)
    assert 0 < largest_batch.largest_batch(peak, 8 * 2**20) < largest_batch.largest_batch(peak, 16 * 2**20)


def test_floors_need_features_that_are_looked_for():
    known = {*devices.VECTOR_EXTENSIONS.values(), *devices.MATRIX_EXTENSIONS.values()}
    needed = {floor["needs"] for section in floors.load().values() for floor in section["floors"] if "needs" in floor}
    assert needed
    assert needed <= known


@pytest.mark.parametrize(
    "module", brief(["benchmarks", "benchmarks.report", "benchmarks.profile_conv_vae", "benchmarks.largest_batch"], ["benchmarks"])
)
def test_help(module):
    shown = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith(f"usage: python -m {module}")


@pytest.mark.parametrize(("arguments", "message"), [(["unheard-of"], "family: got"), (["--threads", "0"], "whole number from 1")])
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err
