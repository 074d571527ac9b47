"""Builds, tests, sanitizes and benchmarks on this machine within a time budget: ``make gpu-pass OUT=dir STAGES="build test"``.

Every stage writes ``OUT/<stage>.log`` and the summary is rewritten after each, so what was found stays when a later stage fails. Nothing is
downloaded: the torch, compiler and test packages of the Python that runs this are used. Without a GPU it names what it cannot do and runs
the rest.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A family has kernels of its own.
FAMILIES = sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py"))
FAMILY_TESTS = tuple(f"tests/test_{family}.py" for family in FAMILIES)
# Families that only read and write memory come first, whole models last, because compiling those takes the longest.
BENCHMARKS = tuple(
    sorted(
        (path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")),
        key=lambda family: (family not in FAMILIES, family not in ("latent", "reconstruction"), family),
    )
)
# Seconds in all. A GPU is often had for ten minutes at a time.
BUDGET_WITH_GPU, BUDGET_WITHOUT = 540, 1800
# A stage whose time runs out is asked to stop, so that it still writes its findings to its log.
GRACE = 10
OWN_PROCESSES = ("cuda", "emulation", "interpret", "offline")
NATIVE_TESTS = ("pytest", "tests", *(f"--ignore=tests/{folder}" for folder in OWN_PROCESSES), "-q", "-rfE", "--tb=short")
CUDA_TESTS = ("pytest", "tests/cuda", "-q", "-rfEs", "--tb=short")
# The compiled kernels on the GPU, whose tests have a place of theirs in their names; a few examples of each property, since Triton compiles
# for many of them anew. Everything else comes after the figures.
ON_GPU, ELSEWHERE = "cuda- and not cuda-fallback and not cuda-reference", "not cuda- or cuda-fallback or cuda-reference"
BRIEF = "--hypothesis-profile=brief"
# compute-sanitizer slows kernels down so much that it gets one small test of each family.
SANITIZED_TESTS = ("pytest", *FAMILY_TESTS, "-q", "--tb=short", BRIEF, "-k", f"odd_sizes and float32 and {ON_GPU}")
# In the order of what they find: accesses out of bounds, races in shared memory, barriers that not all threads reach, reads of memory that
# nothing has written.
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass(frozen=True)
class Machine:
    gpu: str | None
    sanitizer: str | None
    capability: str | None = None  # "9.0"
    processes: int = 1  # for tests; more than one needs pytest-xdist


@dataclass(frozen=True)
class Command:
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    name: str
    weight: int  # its part of the time that is left
    commands: tuple[Command, ...]
    impossible: str | None = None


@dataclass(frozen=True)
class Result:
    stage: str
    status: str  # passed, failed, timed out, or impossible
    seconds: float
    detail: str


def look_at_machine() -> Machine:
    """In a process of its own, so that this one holds no GPU memory."""
    facts = "c.get_device_name(), *c.get_device_capability()"
    probe = f"from torch import cuda as c; print(*([{facts}] if c.is_available() else []), sep='|')"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
    gpu, *capability = found.split("|")
    processes = min(8, os.cpu_count() or 1) if importlib.util.find_spec("xdist") else 1
    return Machine(gpu or None, _sanitizer(), ".".join(capability) or None, processes)


def _sanitizer() -> str | None:
    """On the PATH, or where the toolkit has it."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def python(*module: str, **environment: str) -> Command:
    return Command((sys.executable, "-m", *module), environment)


def stages(machine: Machine, out: Path) -> dict[str, Stage]:
    """Every stage by name, in the order in which they run: on a GPU what only a GPU shows comes first, should the time run out."""
    every = (
        Stage("build", 8, (_build(machine), python("fastvae.info"))),
        Stage("test", 8, _tests(machine)),
        _sanitize(machine),
        Stage("bench", 5, _benchmarks(machine, out)),
        _rest(machine),
        Stage("emulation", 3, (python("pytest", "tests/emulation", "-q", "-rs"),)),
        Stage("interpret", 3, (python("pytest", "tests/interpret", "-q", TRITON_INTERPRET="1"),)),
        Stage("offline", 3, (python("pytest", "tests/offline", "-q"),)),
    )
    return {stage.name: stage for stage in every}


def _build(machine: Machine) -> Command:
    """For this GPU alone: the other architectures would take five times as long."""
    archs = {} if machine.capability is None else {"TORCH_CUDA_ARCH_LIST": machine.capability}
    return Command((sys.executable, "setup.py", "build_ext", "--inplace"), {"FASTVAE_BUILD": "1", **archs})


def _tests(machine: Machine) -> tuple[Command, ...]:
    if machine.gpu is None:
        return python(*CUDA_TESTS), python(*NATIVE_TESTS)
    # The first by itself: it fills the GPU's memory and looks at how much is in use.
    return python(*CUDA_TESTS), python(*NATIVE_TESTS, *_in_parallel(machine), BRIEF, "-k", ON_GPU)


def _rest(machine: Machine) -> Stage:
    if machine.gpu is None:
        return Stage("rest", 0, (), "there is no GPU, so `test` has run all of them")
    return Stage("rest", 1, (python(*NATIVE_TESTS, *_in_parallel(machine), BRIEF, "-k", ELSEWHERE),))


def _in_parallel(machine: Machine) -> tuple[str, ...]:
    return () if machine.processes == 1 else ("-n", str(machine.processes), "--dist", "loadgroup")


def _sanitize(machine: Machine) -> Stage:
    if machine.gpu is None:
        return Stage("sanitize", 0, (), "compute-sanitizer watches kernels on an NVIDIA GPU, and torch sees none")
    if machine.sanitizer is None:
        return Stage("sanitize", 0, (), "compute-sanitizer is not on the PATH (it comes with the CUDA toolkit)")
    # Each tensor gets an allocation of its own: inside torch's cached blocks an overrun would be a legal access.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    prefix = (machine.sanitizer, "--error-exitcode=1", "--target-processes=application-only")
    tests = (sys.executable, "-m", *SANITIZED_TESTS)
    return Stage("sanitize", 2, tuple(Command((*prefix, f"--tool={tool}", *tests), environment) for tool in SANITIZER_TOOLS))


def _benchmarks(machine: Machine, out: Path) -> tuple[Command, ...]:
    device = "cuda" if machine.gpu else "cpu"
    quick = python("benchmarks", *BENCHMARKS, "--device", device, "--quick", "--out", str(out / "bench-quick.csv"))
    if machine.gpu is None:
        return (quick,)
    return quick, python("benchmarks", *BENCHMARKS, "--device", device, "--out", str(out / "bench.csv"))


def default_stages(machine: Machine) -> list[str]:
    """On a GPU what only a GPU shows; elsewhere also the suites that prove the GPU kernels without one."""
    without_gpu = [] if machine.gpu else ["emulation", "interpret", "offline"]
    return ["build", "test", "sanitize", "bench", "rest", *without_gpu]


def share(remaining: float, weights: list[int]) -> float:
    """The seconds for the first of the stages with these weights: what earlier stages left over goes to the later ones."""
    return max(0.0, remaining) * weights[0] / max(1, sum(weights))


def run_stage(stage: Stage, out: Path, seconds: float) -> Result:
    """Runs the stage's commands, which do not need each other: one that fails or takes too long leaves the others their time."""
    if stage.impossible:
        return Result(stage.name, "impossible", 0.0, stage.impossible)
    start = time.monotonic()
    log = out / f"{stage.name}.log"
    log.write_text("")
    outcomes = []
    for index, command in enumerate(stage.commands):
        remaining = start + seconds - time.monotonic()
        outcomes.append(_run(command, log, share(remaining, [1] * (len(stage.commands) - index))))
    status = next((status for status, _ in outcomes if status != "passed"), "passed")
    return Result(stage.name, status, time.monotonic() - start, "; ".join(detail for _, detail in outcomes if detail))


def _run(command: Command, log: Path, seconds: float) -> tuple[str, str]:
    """How the command ended, and its last line."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | command.environment
    with log.open("a") as stream:
        stream.write(f"$ {shlex.join(command.arguments)}\n")
        stream.flush()
        process = subprocess.Popen(
            command.arguments, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            start_new_session=True, preexec_fn=_heed_interrupts,
        )  # fmt: skip
        try:
            status = "failed" if process.wait(max(0.0, seconds)) else "passed"
        except subprocess.TimeoutExpired:
            _stop(process)
            status = "timed out"
    return status, last_line(log.read_text(errors="replace"))


def _heed_interrupts() -> None:
    """Where the pass runs in the background, the shell has had interrupts ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen) -> None:
    """An interrupt, at which pytest says what failed until then, and then the end of all it started."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(text: str) -> str:
    return next((line.strip("= ") for line in reversed(text.splitlines()) if line.strip("= ")), "")


def summary(machine: Machine, results: list[Result]) -> str:
    lines = [f"# GPU pass: {machine.gpu or 'no GPU'}", ""]
    if machine.gpu is None:
        lines += ["torch sees no GPU here: no CUDA test, no sanitizer and no GPU timing was run. What follows ran on the CPU.", ""]
    lines += ["| stage | status | seconds | last line |", "|---|---|---|---|"]
    lines += [f"| {r.stage} | {r.status} | {r.seconds:.0f} | {r.detail.replace('|', '/')} |" for r in results]
    return "\n".join(lines) + "\n"


def passed(results: list[Result]) -> bool:
    """Whether all that could run did, and passed."""
    return all(result.status in ("passed", "impossible") for result in results)


def write_summary(machine: Machine, results: list[Result], out: Path) -> None:
    facts = {"gpu": machine.gpu, "passed": passed(results), "stages": [asdict(result) for result in results]}
    (out / "summary.json").write_text(json.dumps(facts, indent=2) + "\n")
    (out / "summary.md").write_text(summary(machine, results))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the logs, the CSV files and the summary")
    names = list(stages(Machine(None, None), Path()))
    parser.add_argument("--stages", nargs="*", choices=names, help="what to run; by default all that this machine can")
    parser.add_argument("--budget", type=float, help=f"seconds in all (default: {BUDGET_WITH_GPU} with a GPU, {BUDGET_WITHOUT} without)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    machine = look_at_machine()
    wanted = options.stages or default_stages(machine)
    selected = [stage for name, stage in stages(machine, out).items() if name in wanted]
    deadline = time.monotonic() + (options.budget or (BUDGET_WITH_GPU if machine.gpu else BUDGET_WITHOUT))
    results: list[Result] = []
    for index, stage in enumerate(selected):
        seconds = share(deadline - time.monotonic(), [later.weight for later in selected[index:]])
        print(f"{stage.name}: {stage.impossible or f'at most {seconds:.0f} s'}", flush=True)
        results.append(run_stage(stage, out, seconds))
        write_summary(machine, results, out)
    print(summary(machine, results))
    return 0 if passed(results) else 1


if __name__ == "__main__":
    sys.exit(main())
