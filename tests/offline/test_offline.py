"""What the machine code of every kernel shows on sm_80, sm_90, sm_100 and gfx942, and what its launches move."""

import ast
import importlib
import inspect
import math
import pkgutil
import re

import offline_cases
import offline_table
import pytest
import torch
from _jobs import JOBS, each_job, each_target
from offline_cases import CASES, DTYPES, TARGETS
from offline_table import Launch
from triton.runtime.jit import JITFunction

import fastvae.kernels
from fastvae.kernels import _launch

OUTPUTS = (
    "z", "kept", "kl", "loss", "out", "output", "penalty", "scaled",
    "grad_mu", "grad_logvar", "grad_prior_mu", "grad_prior_logvar", "grad_input", "grad_target", "grad_hidden", "grad_weight", "grad_left",
)  # fmt: skip

# Kernels that take float32 alone, whatever the dtype of the model.
FLOAT32_ALONE = {offline_cases.GRAM_SCALE, offline_cases.GRAM_REDUCE}

# The operands of the codebook's kernels that are read and written a block of rows at once, if the rows allow it: 16 bytes of each have to
# begin at a multiple of 16 elements. The others take few numbers for each row, or, to recheck, single rows.
ROWS_READ = {
    "measure": ("codebook",),
    "pack_codes": ("codebook",),
    "pack_rows": ("x",),
    "screen": ("rows_packed", "codes_packed"),
    "gather": ("x", "codebook"),
    "backward": ("grad_quantized", "x", "codebook"),
    "parts": ("x",),
    "sums": ("partial",),
    "ema": ("ema_sum", "sums"),
}
ROWS_WRITTEN = {
    "pack_codes": ("packed",),
    "pack_rows": ("packed",),
    "gather": ("quantized",),
    "backward": ("grad_x",),
    "sums": ("sums",),
    "ema": ("codebook", "ema_sum"),
}


def modules():
    names = sorted(module.name for module in pkgutil.iter_modules(fastvae.kernels.__path__))
    return [importlib.import_module(f"fastvae.kernels.{name}") for name in names]


def jit_functions() -> dict[str, JITFunction]:
    return {name: value for module in modules() for name, value in vars(module).items() if isinstance(value, JITFunction)}


def launched_names(module) -> set[str]:
    """What stands before ``[grid](...)`` in a module."""
    calls = (node.func for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call))
    return {call.value.id for call in calls if isinstance(call, ast.Subscript) and isinstance(call.value, ast.Name)}


def test_every_kernel_is_compiled_here():
    """A kernel is a jit function whose name ends in ``_kernel``; whatever is launched is one, and a case of the table launches each."""
    kernels = {name for name in jit_functions() if name.endswith("_kernel")}
    assert set().union(*(launched_names(module) for module in modules())) == kernels
    assert {name for case in CASES for name in case.kernels} == kernels
    for dtype in DTYPES:
        taken = kernels if dtype == "float32" else kernels - FLOAT32_ALONE
        assert {launch.name for job in JOBS if job.dtype == dtype for launch in job.launches()} == taken
    for target in TARGETS:
        assert {name for job in JOBS if job.target == target for name in job.case.kernels} == kernels


@each_job
def test_launches_are_those_of_the_case(job):
    assert [launch.name for launch in job.launches()] == list(job.case.kernels)


@each_job
def test_nothing_spills(job, binaries):
    for row, _, _ in binaries[job]:
        assert row.spill_bytes == 0
        assert row.registers <= 255


def tensors(launch: Launch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in launch.by_name().items() if isinstance(value, torch.Tensor)}


def elements(launch: Launch) -> float:
    """The elements of the input, once for all samples; where there are matrices of each sample, of them all; infinite where a launch reads
    sums alone."""
    arguments = launch.by_name()
    if "n" in arguments:
        return arguments["n"]
    if launch.name == "logistic_mixture_kernel":
        return arguments["input"].numel()
    if "rows" in arguments:
        return arguments.get("batch", 1) * arguments["rows"] * arguments["columns"]
    return arguments["input"].numel() if "input" in arguments else math.inf


def elements_per_thread(launch: Launch, machine: _launch.Machine) -> int:
    arguments = launch.by_name()
    threads = arguments["num_warps"] * machine.warp_size
    if "TILES" in arguments:
        return arguments["TILES"] * _launch.NOISE_TILE // threads
    return arguments.get("BLOCK", arguments.get("ROWS", 1) * arguments.get("COLUMNS", 1)) // threads


def streamed(launch: Launch) -> dict[str, torch.Tensor]:
    """The operands with a value for every element."""
    if launch.name.startswith("codebook_"):
        return of_rows(launch, ROWS_READ) | of_rows(launch, ROWS_WRITTEN)
    return {name: tensor for name, tensor in tensors(launch).items() if tensor.numel() >= elements(launch)}


def of_rows(launch: Launch, operands: dict[str, tuple[str, ...]]) -> dict[str, torch.Tensor]:
    arguments, part = launch.by_name(), launch.name.removeprefix("codebook_").removesuffix("_kernel")
    fits = arguments.get("dim", arguments.get("padded_dim", 1)) % 16 == 0
    return {name: tensor for name, tensor in tensors(launch).items() if fits and name in operands.get(part, ())}


def loaded(launch: Launch) -> dict[str, torch.Tensor]:
    if launch.name.startswith("codebook_"):
        return of_rows(launch, ROWS_READ)
    return {name: tensor for name, tensor in streamed(launch).items() if name not in OUTPUTS}


def stored(launch: Launch) -> dict[str, torch.Tensor]:
    if launch.name.startswith("codebook_"):
        return of_rows(launch, ROWS_WRITTEN)
    in_place = launch.name == "reconstruction_rescale_kernel"
    return {name: tensor for name, tensor in streamed(launch).items() if name in OUTPUTS or (in_place and name == "grad")}


def vectorised(launch: Launch, operands: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Samples that begin anywhere in memory cannot be accessed 16 bytes at once."""
    begins_anywhere = launch.by_name().get("ALIGNED") is False
    return [tensor for name, tensor in operands.items() if not (begins_anywhere and name in ("z", "grad_z"))]


@each_job
def test_accesses_of_16_bytes_on_every_operand(job, binaries):
    """As many as a thread's elements of all operands fill, in the loop over full blocks."""
    for launch, (row, _, _) in zip(job.launches(), binaries[job], strict=True):
        # A thread has one position there, whose long formula takes its registers; adjacent threads have adjacent ones.
        if launch.name == "logistic_mixture_kernel":
            continue
        per_thread = elements_per_thread(launch, TARGETS[job.target][1])
        assert all(per_thread * tensor.element_size() >= _launch.ACCESS_BYTES for tensor in streamed(launch).values())
        loads, stores = (
            sum(per_thread * tensor.element_size() for tensor in vectorised(launch, operands)) // _launch.ACCESS_BYTES
            for operands in (loaded(launch), stored(launch))
        )
        assert row.wide_loads >= loads
        assert row.wide_stores >= stores


# The operands that a kernel reads a second time, where a block does not hold what it sums.
READ_TWICE = {offline_cases.RMS_TILES: ("input",), offline_cases.RMS_BACKWARD_TILES: ("input", "grad_output")}

WIDENS = ("arith.addi", "arith.subi", "arith.remsi", "arith.divsi", "arith.select", "tt.splat", "tt.expand_dims", "tt.broadcast")


def narrow_products(code: str) -> list[str]:
    """Products in 32 bits of what comes from a program's number: they overflow where a tensor has more than 2^31 elements. The product of
    such numbers and sizes of the grid, which is the number of a program of the whole grid, does not."""
    from_program, of_grid, products = set(), set(), []
    for line in code.splitlines():
        match = re.match(r"\s*(%\S+) = (\S+)(.*)", line)
        if match is None:
            continue
        result, operation, rest = match.groups()
        narrow = not re.search(r"i64>?$", re.sub(r" loc\(.*", "", rest).split(" : ")[-1].split("->")[-1].strip())
        operands = set(re.findall(r"%[\w#]+", rest))
        if operation in ("tt.get_program_id", "tt.get_num_programs"):
            of_grid.add(result)
        if operation == "tt.get_program_id" or (operation == "arith.muli" and operands <= of_grid and operands & from_program):
            from_program.add(result)
        elif operation == "scf.for":
            bound = re.search(r"(%\S+) = (%\S+) to", rest)
            if bound and bound.group(2) in from_program:
                from_program.add(bound.group(1))
        elif narrow and operands & from_program:
            if operation in ("arith.muli", "arith.shli"):
                products.append(line.strip())
            if operation in WIDENS:
                from_program.add(result)
    return products


@each_job
def test_offsets_are_64_bits_wide(job, binaries):
    for _, code, _ in binaries[job]:
        assert "tt.get_program_id" in code
        assert re.search(r"tt\.addptr .*, i64|tt\.addptr .*xi64>", code)
        assert not narrow_products(code)


def test_narrow_products_are_found():
    code = """
    %program = tt.get_program_id x : i32
    %wide = arith.extsi %program : i32 to i64
    %0 = arith.muli %wide, %c1024_i64 : i64
    %more = scf.for %index = %program to %n step %c1_i32 iter_args(%x = %y) -> (f32)  : i32 {
    %1 = arith.addi %index, %c1_i32 : i32
    %2 = tt.splat %1 : i32 -> tensor<128xi32>
    %3 = arith.muli %2, %cst : tensor<128xi32>
    """
    assert narrow_products(code) == ["%3 = arith.muli %2, %cst : tensor<128xi32>"]


def bytes_per_element(launch: Launch) -> float:
    """Read and written in one launch, an operand that is broadcast over the batch not at all."""
    again = [tensors(launch)[name] for name in READ_TWICE.get(launch.name, ())]
    operands = [*loaded(launch).values(), *again, *stored(launch).values()]
    moved = [tensor for tensor in operands if 0 not in tensor.stride()]
    return sum(tensor.numel() * tensor.element_size() for tensor in moved) / elements(launch)


# What the design counts, per element of the input; of each launch, where a case has several.
BYTES = {
    "sample and KL": {"float32": 12, "bfloat16": 6, "float16": 6},
    "sample and KL, chunks": {"float32": 12, "bfloat16": 6},
    "sample and KL, odd size": {"float32": 12},
    "sample and KL, prior": {"float32": 12},
    "sample and KL, given noise": {"float32": 16},
    "sample": {"float32": 12},
    "several samples and KL": {"float32": 8 + 4 * offline_cases.DRAWS},
    "KL elementwise": {"float32": 12},
    "KL by sample": {"float32": 8, "bfloat16": 4, "float16": 4},
    "gradients of sample and KL": {"float32": 20, "bfloat16": 10, "float16": 10},
    "gradients of sample and KL, chunks": {"float32": 20, "bfloat16": 10},
    "gradients of sample and KL by sample, free bits": {"float32": 20},
    "gradients of a given noise's sample": {"float32": 20},
    "gradients of several samples": {"float32": 12 + 4 * offline_cases.DRAWS},
    "gradients of the KL": {"float32": 16},
    "BCE from logits": {"float32": 12, "bfloat16": 6, "float16": 6},
    "BCE from logits, uint8": {"float32": 9, "bfloat16": 5, "float16": 5},
    "BCE from logits, value alone": {"float32": 8},
    "BCE from logits, elementwise": {"float32": 12},
    "BCE": {"float32": 12, "bfloat16": 6},
    "MSE": {"float32": 12, "bfloat16": 6},
    "MSE, uint8": {"float32": 9, "bfloat16": 5},
    "Gaussian, one variance": {"float32": 12, "bfloat16": 6},
    "Gaussian, a variance an element": {"float32": 20, "bfloat16": 10},
    "BCE from logits by sample": {"float32": 8, "bfloat16": 4, "float16": 4},
    "BCE from logits by sample, uint8": {"float32": 5},
    "gradients of BCE from logits by sample": {"float32": 12, "bfloat16": 6, "float16": 6},
    "gradients of BCE from logits": {"float32": 16},
    "gradients of BCE from logits in place": {"float32": 12, "bfloat16": 6, "float16": 6},
    "rescale in place": {"float32": 8, "bfloat16": 4, "float16": 4},
    "mixture of logistics": {"float32": 8, "bfloat16": 4, "float16": 4},
    "mixture of logistics by sample": {"float32": 4},
    "gradients of a mixture of logistics by sample": {"float32": 8},
    "penalty": {"float32": (4, 4), "bfloat16": (2, 2), "float16": (2, 2)},
    "penalty with its gradients": {"float32": (4, 8, 8), "bfloat16": (2, 4, 4)},
    "penalty by sample": {"float32": (4, 4), "bfloat16": (2, 2), "float16": (2, 2)},
    "penalty elementwise": {"float32": (4, 8)},
    "gradients of the penalty": {"float32": (8, 8), "bfloat16": (4, 4), "float16": (4, 4)},
    "gradients of the penalty elementwise": {"float32": (12, 8)},
    "Gram form, scaled": {"float32": 4},
    "Gram form, reduced": {"float32": 4},
    "Gram form, reduced, a matrix a sample": {"float32": 12},
    "GroupNorm, SiLU": {"float32": 12},
    "GroupNorm, SiLU, 16 bits": {"bfloat16": 6, "float16": 6},
    "GroupNorm, SiLU, channels last": {"float32": 12, "bfloat16": 6, "float16": 6},
    "GroupNorm, SiLU, small groups": {"float32": 8, "bfloat16": 4, "float16": 4},
    "GroupNorm, SiLU, small groups, channels last": {"float32": 8, "bfloat16": 4, "float16": 4},
    "GroupNorm, SiLU, groups of 8,192": {"float32": 8, "bfloat16": 4},
    "GroupNorm, SiLU, groups of 16,384": {"float32": 8, "bfloat16": 4, "float16": 4},
    "GroupNorm, SiLU, groups of 16,384, channels last": {"float32": 8, "bfloat16": 4, "float16": 4},
    "GroupNorm, GELU, channels last": {"float32": 12},
    "gradients of GroupNorm, GELU, channels last": {"float32": 20},
    "gradients of GroupNorm, SiLU": {"float32": 20},
    "gradients of GroupNorm, SiLU, 16 bits": {"bfloat16": 10, "float16": 10},
    "gradients of GroupNorm, SiLU, channels last": {"float32": 20, "bfloat16": 10, "float16": 10},
    "gradients of GroupNorm, SiLU, small groups": {"float32": 12, "bfloat16": 6, "float16": 6},
    "gradients of GroupNorm, SiLU, small groups, channels last": {"float32": 12, "bfloat16": 6, "float16": 6},
    "gradients of GroupNorm, SiLU, groups of 8,192": {"float32": 12, "bfloat16": 6},
    "gradients of GroupNorm, SiLU, groups of 16,384": {"bfloat16": 6, "float16": 6},
    "gradients of GroupNorm, SiLU, groups of 8,192, channels last": {"float32": 12, "bfloat16": 6, "float16": 6},
    "RMS norm, SiLU": {"float32": 8, "bfloat16": 4, "float16": 4},
    "RMS norm, SiLU, channels last": {"float32": 8, "bfloat16": 4, "float16": 4},
    "RMS norm, SiLU, video": {"float32": 8, "bfloat16": 4},
    "RMS norm, SiLU, video, channels last": {"float32": 8, "bfloat16": 4},
    "RMS norm, SiLU, 1,024 channels": {"float32": 8, "bfloat16": 4},
    "RMS norm, SiLU, 4,096 channels, channels last": {"float32": 8, "bfloat16": 4},
    "RMS norm, SiLU, in tiles": {"float32": 12, "bfloat16": 6, "float16": 6},
    "RMS norm, GELU, video": {"float32": 8},
    "gradients of RMS norm, GELU, 1,024 channels": {"float32": 12},
    "gradients of RMS norm, SiLU": {"float32": 12, "bfloat16": 6, "float16": 6},
    "gradients of RMS norm, SiLU, channels last": {"float32": 12, "bfloat16": 6, "float16": 6},
    "gradients of RMS norm, SiLU, video": {"float32": 12, "bfloat16": 6},
    "gradients of RMS norm, SiLU, video, channels last": {"float32": 12, "bfloat16": 6},
    "gradients of bounded RMS norm, SiLU, video": {"float32": 12, "bfloat16": 6},
    "gradients of RMS norm, SiLU, 1,024 channels": {"float32": 12, "bfloat16": 6},
    "gradients of RMS norm, SiLU, 4,096 channels, channels last": {"float32": 12, "bfloat16": 6},
    "gradients of RMS norm, SiLU, in tiles": {"float32": 20, "bfloat16": 10, "float16": 10},
    "snake": {"float32": 8, "bfloat16": 4, "float16": 4},
    "snake, channels last": {"float32": 8, "bfloat16": 4, "float16": 4},
    "gradients of snake": {"float32": 12, "bfloat16": 6},
    "gradients of snake, channels last": {"float32": 12, "bfloat16": 6},
}


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name, counts in BYTES.items() for dtype in counts])
def test_bytes_moved_per_element(name, dtype):
    (case,) = (case for case in CASES if case.name == name)
    counts = [bytes_per_element(launch) for launch in offline_table.launches(case, DTYPES[dtype], TARGETS["sm_90"][1])]
    expected = BYTES[name][dtype]
    assert (tuple(counts) if isinstance(expected, tuple) else sum(counts)) == expected


def test_bytes_are_counted_for_every_kernel():
    assert {name for case in CASES if case.name in BYTES for name in case.kernels} >= {
        name for name in jit_functions() if name.endswith("_kernel") and not name.startswith(("latent_columns", "codebook_"))
    }


@pytest.mark.parametrize(("dtype", "expected"), [("float32", (6, 8, 12)), ("bfloat16", (4, 4, 6)), ("float16", (4, 4, 6))])
def test_bytes_moved_by_vector_quantization(dtype, expected):
    """Per element of x, codes not counted: its copy in float16, the gather with the loss, the gradient."""
    moved = []
    for case in CASES:
        if case.name in ("quantize", "gradients of quantize"):
            for launch in offline_table.launches(case, DTYPES[dtype], TARGETS["sm_90"][1]):
                if launch.name in ("codebook_pack_rows_kernel", offline_cases.GATHER, offline_cases.VQ_BACKWARD):
                    large = [t for t in (*loaded(launch).values(), *stored(launch).values()) if t.shape[1] == offline_cases.VECTORS]
                    moved.append(sum(t.numel() * t.element_size() for t in large) / large[0].numel())
    assert tuple(moved) == expected


@each_job
def test_screens_run_on_tensor_cores(job, binaries):
    """Where vectors are long enough; in no other kernel."""
    for launch, (row, _, _) in zip(job.launches(), binaries[job], strict=True):
        assert (row.tensor_core > 0) == (launch.name == "codebook_screen_kernel" and launch.by_name()["HALF"])


# Shares of what is counted. Of the Gram form each group of rows has its own part of the gradient of the inner slopes.
LITTLE = {"Gram form, reduced": 0.3, "Gram form, reduced, a matrix a sample": 0.1}


@pytest.mark.parametrize("name", BYTES)
def test_what_is_not_counted_is_little(name):
    """Sums of parts, and operands with a value for each row or column."""
    (case,) = (case for case in CASES if case.name == name)
    counted, rest = 0, 0
    for launch in offline_table.launches(case, DTYPES[case.dtypes[0]], TARGETS["sm_90"][1]):
        for key, tensor in tensors(launch).items():
            if key in streamed(launch):
                counted += tensor.nbytes
            else:
                rest += tensor.nbytes
    assert rest < LITTLE.get(name, 0.05) * counted


@each_target
def test_the_table_is_that_of_this_code(target, binaries):
    """With a version of Triton that has no rows in it, the other tests have to do."""
    compiled = [code.row for codes in binaries.of_target(target).values() for code in codes]
    table = [row for row in offline_table.read_table() if (row.triton, row.target) == (compiled[0].triton, target)]
    assert not table or table == compiled, "run python tools/offline_table.py"


def test_the_table_is_complete_and_spills_nothing_with_any_version():
    """This holds for the pinned torch's Triton, and for each other one that the table was made with."""
    table = offline_table.read_table()
    versions = {row.triton for row in table}
    assert "3.9.0" in versions
    expected = [(job.case.name, kernel, job.dtype, job.target) for job in JOBS for kernel in job.case.kernels]
    for version in versions:
        rows = [row for row in table if row.triton == version]
        assert [(row.case, row.kernel, row.dtype, row.target) for row in rows] == expected, (
            f"run tools/offline_table.py with Triton {version}"
        )
        assert [row.id for row in rows if row.spill_bytes] == []
