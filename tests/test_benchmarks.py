"""The benchmark suite: every case's providers agree, a wrong one is caught, and figures survive the way into tables and floors."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import devices, floors, plots, registry, report, results, tables
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
    assert {"eager", "compile", "fastvae"} <= set(case.providers)
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
    measurement = measure(dataclasses.replace(case, size=case.tiny, providers=providers), WithReference(), BRIEF)
    assert set(measurement.timings["launch"]) == {"eager", "fastvae", "fastvae-reference"}
    assert "backend 'cuda' cannot serve" in measurement.absent["fastvae-cuda"]
    rows = results.figures(results.describe_run(CPU), measurement)
    header, _, row = tables._table([case], {(row.case, row.provider): row for row in rows}).splitlines()
    assert "fastvae-reference" in header
    assert case.name in row


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
    assert results.device_slug("cpu", "Intel(R) Xeon(R) Gold 6430 @ 2.1GHz", 2) == "cpu-intel-xeon-gold-6430-2-1ghz-2threads"
    assert results.device_slug("cuda", "NVIDIA H200", 16) == "cuda-nvidia-h200"


def test_tables_hold_the_figures_and_say_what_was_not_measured():
    text = tables.tables(FIGURES)
    row = next(line for line in text.splitlines() if line.startswith("| mse_loss (128, 784)"))
    assert "| 250 µs | 375 µs (1.5x) | not measured |" in row
    assert "| 4 GB/s, 25% of a copy | 2 MiB (eager 4 MiB) |" in row
    assert "| gaussian_nll (32, 3, 256, 256) float32 | not measured | not measured |" in text
    assert "**latent**: not measured." in text
    assert text.endswith("### CUDA\n\nNot measured.")


def test_readme_is_written_once_and_checked(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    monkeypatch.setattr(results, "read_all", lambda: FIGURES)
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    written = readme.read_text()
    assert report.main(["--check"]) == 0
    assert report.main([]) == 0
    assert readme.read_text() == written
    assert written.startswith("before\n<!-- benchmarks:begin -->\nTimes are of")
    assert written.endswith("<!-- benchmarks:end -->\nafter\n")
    assert "old" not in written


def test_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="benchmarks:begin"):
        tables.inserted("no marks", "text")


def test_a_picture_for_each_device_mode_and_family(tmp_path):
    figures = [*FIGURES, *(make_figure(device="cuda", device_name="NVIDIA H200", mode=mode) for mode in ("launch", "graph"))]
    drawn = plots.draw(figures, tmp_path)
    assert len(drawn) == 3
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_floors_name_what_falls_short(capsys):
    floor = {"case": "mse_loss-*", "at_least": {"eager": 2.0, "compile": 1.0}, "share_of_roof": 0.2}
    section = {"threads": 2, "mode": "launch", "floors": [floor]}
    found = {verdict.provider: verdict for verdict in floors.judge(FIGURES, {"cpu": section})}
    assert found["eager"].falls_short
    assert found["eager"].measured == 1.5
    assert found["compile"].measured is None
    assert not found["compile"].falls_short
    assert found["share of the roof"].measured == 0.25
    assert report.hold_against_floors(FIGURES) == 0
    assert report.hold_against_floors([make_figure(provider="eager", ratio=0.5)]) == 1
    assert "0.50 FALLS SHORT" in capsys.readouterr().out


def test_floors_pass_over_other_machines():
    floor = {"case": "*", "at_least": {"eager": 2.0}}
    strangers = [dataclasses.replace(FIGURES[1], threads=3), dataclasses.replace(FIGURES[1], device_name="another")]
    verdicts = floors.judge(strangers, {"cpu": {"threads": 2, "mode": "launch", "floors": [floor]}})
    assert [verdict.measured for verdict in verdicts] == [None]


@pytest.mark.parametrize("module", ["benchmarks", "benchmarks.report"])
def test_help(module):
    shown = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith(f"usage: python -m {module}")


@pytest.mark.parametrize(("arguments", "message"), [(["unheard-of"], "family: got"), (["--threads", "0"], "whole number from 1")])
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err
