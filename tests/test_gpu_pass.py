"""The pure parts of tools/gpu_pass.py, and its stages run on stand-in commands."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("gpu_pass", ROOT / "tools/gpu_pass.py")
gpu_pass = importlib.util.module_from_spec(_spec)
sys.modules["gpu_pass"] = gpu_pass
_spec.loader.exec_module(gpu_pass)

NO_GPU = gpu_pass.Machine(gpu=None, sanitizer=None)
GPU = gpu_pass.Machine(gpu="a GPU", sanitizer="compute-sanitizer", capability="9.0", processes=8)


def stage(*programs: str, name: str = "test") -> "gpu_pass.Stage":
    return gpu_pass.Stage(name, 1, tuple(gpu_pass.Command((sys.executable, "-c", program)) for program in programs))


def commands(machine, name: str) -> list[str]:
    return [" ".join(command.arguments) for command in gpu_pass.stages(machine, Path("out"))[name].commands]


def test_stages_run_in_order_and_under_their_own_names():
    stages = gpu_pass.stages(GPU, Path("out"))
    assert list(stages) == ["build", "test", "sanitize", "bench", "rest", "emulation", "interpret", "offline"]
    assert all(name == stage.name for name, stage in stages.items())


def test_default_on_a_gpu_is_what_only_a_gpu_shows():
    assert gpu_pass.default_stages(GPU) == ["build", "test", "sanitize", "bench", "rest"]


def test_default_without_a_gpu_proves_the_kernels_otherwise():
    assert {"emulation", "interpret", "offline"} < set(gpu_pass.default_stages(NO_GPU))


def test_interpreter_and_offline_compilation_have_processes_of_their_own():
    stages = gpu_pass.stages(NO_GPU, Path("out"))
    assert stages["interpret"].commands[0].environment == {"TRITON_INTERPRET": "1"}
    assert stages["offline"].commands[0].environment == {}
    cuda, native = commands(NO_GPU, "test")
    assert "tests/cuda" in cuda
    assert "--ignore=tests/cuda --ignore=tests/emulation --ignore=tests/interpret --ignore=tests/offline" in native


def test_every_folder_of_tests_has_a_process():
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/test_*.py")}
    assert folders == set(gpu_pass.OWN_PROCESSES)


def test_on_a_gpu_its_tests_come_first_and_none_is_left_out():
    cuda, on_gpu = commands(GPU, "test")
    (rest,) = commands(GPU, "rest")
    assert "tests/cuda" in cuda
    assert on_gpu.endswith("-k cuda- and not cuda-fallback and not cuda-reference")
    assert rest.endswith("-k not cuda- or cuda-fallback or cuda-reference")


def test_tests_share_a_gpu_where_xdist_lets_them():
    _, parallel = commands(GPU, "test")
    assert "-n 8" in parallel
    assert "-n 8" not in commands(GPU, "test")[0]
    assert "-n" not in commands(gpu_pass.Machine("a GPU", None), "test")[1].split()


def test_cuda_is_built_for_this_gpu_alone():
    build = gpu_pass.stages(GPU, Path("out"))["build"].commands[0]
    assert build.environment == {"FASTVAE_BUILD": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    assert "TORCH_CUDA_ARCH_LIST" not in gpu_pass.stages(NO_GPU, Path("out"))["build"].commands[0].environment


def test_sanitizer_looks_for_bad_accesses_races_barriers_and_unwritten_memory():
    tools = ("memcheck", "racecheck", "synccheck", "initcheck")
    for command, tool in zip(commands(GPU, "sanitize"), tools, strict=True):
        assert f"--tool={tool}" in command


@pytest.mark.parametrize("family", sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py")))
def test_every_family_has_a_test_for_the_sanitizer(family):
    """The sanitizer selects tests by name."""
    assert "odd_sizes" in gpu_pass.SANITIZED_TESTS[-1]
    assert f"tests/test_{family}.py" in gpu_pass.SANITIZED_TESTS
    assert "def test_odd_sizes(place, dtype" in (ROOT / f"tests/test_{family}.py").read_text()


@pytest.mark.parametrize(
    ("machine", "reason"),
    [(NO_GPU, "torch sees none"), (gpu_pass.Machine("a GPU", None), "not on the PATH")],
    ids=["no GPU", "no sanitizer"],
)
def test_sanitizer_says_why_it_cannot_run(machine, reason):
    assert reason in gpu_pass.stages(machine, Path("out"))["sanitize"].impossible


def test_benchmarks_are_quick_and_on_the_cpu_without_a_gpu():
    (command,) = commands(NO_GPU, "bench")
    assert "--device cpu" in command
    assert "--quick" in command


def test_benchmarks_on_a_gpu_are_quick_first_then_full():
    quick, full = commands(GPU, "bench")
    assert "--quick" in quick
    assert "--quick" not in full
    assert all("--device cuda" in command for command in (quick, full))


def test_operators_are_measured_before_models():
    assert gpu_pass.BENCHMARKS[:2] == ("latent", "reconstruction")
    assert set(gpu_pass.BENCHMARKS[: len(gpu_pass.FAMILIES)]) == set(gpu_pass.FAMILIES)
    assert "conv_vae" in gpu_pass.BENCHMARKS[len(gpu_pass.FAMILIES) :]


def test_time_is_shared_by_weight_and_unused_time_goes_on():
    assert gpu_pass.share(100, [1, 3]) == 25
    assert gpu_pass.share(90, [3]) == 90
    assert gpu_pass.share(-5, [1, 1]) == 0


def test_stage_that_cannot_run_takes_no_time_from_the_others():
    weight = gpu_pass.stages(NO_GPU, Path("out"))["sanitize"].weight
    assert gpu_pass.share(90, [weight]) == 0
    assert gpu_pass.share(90, [3, weight]) == 90


def test_last_line_is_pytest_s_without_its_rule():
    assert gpu_pass.last_line("a\n===== 3 passed in 1s =====\n\n") == "3 passed in 1s"
    assert gpu_pass.last_line("") == ""


def test_stage_that_passes(tmp_path):
    result = gpu_pass.run_stage(stage("print('fine')"), tmp_path, 60)
    assert (result.status, result.detail) == ("passed", "fine")
    assert "fine" in (tmp_path / "test.log").read_text()


def test_stage_goes_on_after_a_failure_and_reports_it(tmp_path):
    result = gpu_pass.run_stage(stage("raise SystemExit('broken')", "print('second')"), tmp_path, 60)
    assert (result.status, result.detail) == ("failed", "broken; second")
    assert "second" in (tmp_path / "test.log").read_text()


def test_stage_that_outlasts_its_time_is_interrupted_and_keeps_its_log(tmp_path):
    """Pytest says on an interrupt what failed."""
    result = gpu_pass.run_stage(stage("import time; print('started', flush=True); time.sleep(600)"), tmp_path, 2)
    assert (result.status, result.detail) == ("timed out", "KeyboardInterrupt")
    assert "started" in (tmp_path / "test.log").read_text()


def test_command_that_takes_too_long_leaves_the_next_its_time(tmp_path):
    result = gpu_pass.run_stage(stage("import time; time.sleep(600)", "print('second')"), tmp_path, 8)
    assert (result.status, result.detail) == ("timed out", "KeyboardInterrupt; second")


def test_impossible_stage_is_not_run(tmp_path):
    impossible = gpu_pass.Stage("sanitize", 1, (), "no GPU")
    assert gpu_pass.run_stage(impossible, tmp_path, 60) == gpu_pass.Result("sanitize", "impossible", 0.0, "no GPU")


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [(["passed", "impossible"], True), (["passed", "failed"], False), (["timed out"], False)],
    ids=str,
)
def test_pass_is_that_all_that_could_run_passed(statuses, expected):
    assert gpu_pass.passed([gpu_pass.Result("a", status, 1.0, "") for status in statuses]) is expected


def test_summary_without_a_gpu_says_what_was_not_done():
    text = gpu_pass.summary(NO_GPU, [gpu_pass.Result("test", "passed", 3.4, "5 passed")])
    assert "no CUDA test, no sanitizer and no GPU timing was run" in text
    assert "| test | passed | 3 | 5 passed |" in text
    assert "not" not in gpu_pass.summary(GPU, [])


def test_unknown_stage_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_pass.parse(["out", "--stages", "compile"])
    assert "invalid choice: 'compile'" in capsys.readouterr().err


def test_main_keeps_results_of_the_stages_before_a_failure(tmp_path, monkeypatch):
    stand_ins = {"build": stage("print('built')", name="build"), "bench": stage("raise SystemExit(3)", name="bench")}
    monkeypatch.setattr(gpu_pass, "look_at_machine", lambda: NO_GPU)
    monkeypatch.setattr(gpu_pass, "stages", lambda machine, out: stand_ins)
    assert gpu_pass.main([str(tmp_path), "--stages", "bench", "build"]) == 1
    facts = json.loads((tmp_path / "summary.json").read_text())
    assert [(s["stage"], s["status"]) for s in facts["stages"]] == [("build", "passed"), ("bench", "failed")]
    assert facts["passed"] is False
    assert "built" in (tmp_path / "build.log").read_text()


def test_machine_has_the_gpu_that_torch_sees():
    assert (gpu_pass.look_at_machine().gpu is not None) == torch.cuda.is_available()
