"""The generated code hands slots from the programs of a launch to its last one without a race, and keeps the precision of the screens.
No test on a CPU would show a mistake there."""

import re

import torch
from _jobs import JOBS, each_job

BARRIER, STORE, WAIT, TICKET, LOAD, COHERENT_LOAD = "barrier", "store", "wait", "ticket", "load", "coherent load"
INVALIDATE = "invalidate"

# The first pattern that fits a line says what it is. Later patterns are more general.
PTX = {
    r"bar(rier)?\.(cta\.)?sync": BARRIER,
    r"atom\.(global\.)?(gpu\.)?acq_rel\.(global\.)?(gpu\.)?add\.": TICKET,
    r"(st|red|atom)\.global": STORE,
    r"ld\.global\.cg\.": COHERENT_LOAD,
    r"ld\.global\.": LOAD,
}
# An atomic operation that returns a value (sc0) is the ticket's; others store.
AMDGCN = {
    r"s_barrier": BARRIER,
    r"s_waitcnt.*vmcnt\(0\)": WAIT,
    r"(global|flat|buffer)_atomic_add .*\bsc0\b": TICKET,
    r"(global|flat|buffer)_(store|atomic)": STORE,
    r"buffer_inv sc1": INVALIDATE,
    r"(global|flat|buffer)_load": LOAD,
}


def steps(assembly: str, patterns: dict[str, str]) -> list[str]:
    """The steps of the code that matter here, in its order."""
    found = []
    for line in assembly.splitlines():
        code = re.sub(r"^\s*(@!?%\w+\s+)?", "", line)
        step = next((step for pattern, step in patterns.items() if re.match(pattern, code)), None)
        if step is not None:
            found.append(step)
    return found


def tickets(found: list[str]) -> list[int]:
    return [i for i, step in enumerate(found) if step == TICKET]


def before(found: list[str], index: int, *kinds: str) -> str | None:
    """The last step of these kinds before a place."""
    return next((step for step in reversed(found[:index]) if step in kinds), None)


def barrier_before(found: list[str], ticket: int) -> int:
    return max((i for i in range(ticket) if found[i] == BARRIER), default=0)


def takes_ticket_after_barrier(found: list[str], ticket: int) -> bool:
    """All threads of the program have stored their slots before one of them takes the ticket."""
    return before(found, ticket, BARRIER, STORE) == BARRIER


def waits_before_barrier(found: list[str], ticket: int) -> bool:
    """Every wavefront has waited for its stores when it comes to the barrier."""
    return before(found, barrier_before(found, ticket), WAIT, STORE) in (WAIT, None)


def takes_tickets(launch) -> bool:
    arguments = launch.by_name()
    return any(isinstance(arguments.get(name), torch.Tensor) for name in ("ticket", "tickets"))


def reads_past_the_first_cache(found: list[str], ticket: int, reads_slots_alone: bool) -> bool:
    """On NVIDIA's GPUs the loads of slots bypass the L1 cache, which does not see what other multiprocessors write."""
    loads = {step for step in found[ticket:] if step in (LOAD, COHERENT_LOAD)}
    return COHERENT_LOAD in loads and not (reads_slots_alone and LOAD in loads)


def invalidates_the_cache(found: list[str], ticket: int) -> bool:
    """On AMD's GPUs taking the ticket invalidates the caches of the compute unit, before the other wavefronts go on."""
    return next((step for step in found[ticket:] if step in (INVALIDATE, BARRIER, LOAD)), None) == INVALIDATE


@each_job
def test_the_last_program_reads_what_the_others_wrote(job, binaries):
    """The code after the ticket reads slots alone, but for the search, which reads vectors too."""
    on_amd = job.target.startswith("gfx")
    for launch, code in zip(job.launches(), binaries[job], strict=True):
        if not takes_tickets(launch):
            continue
        found = steps(code.assembly, AMDGCN if on_amd else PTX)
        assert tickets(found)
        for ticket in tickets(found):
            assert takes_ticket_after_barrier(found, ticket)
            if on_amd:
                assert waits_before_barrier(found, ticket)
                assert invalidates_the_cache(found, ticket)
            else:
                assert reads_past_the_first_cache(found, ticket, launch.name != "codebook_recheck_kernel")


@each_job
def test_no_product_is_rounded_to_tf32(job, binaries):
    assert not any(re.search(r"tf32|xf32", code.assembly) for code in binaries[job])


@each_job
def test_the_search_flushes_nothing_to_zero(job, binaries):
    """Its error bounds count the underflow of packing alone."""
    for code in binaries[job]:
        if code.row.kernel not in ("codebook_screen_kernel", "codebook_recheck_kernel"):
            continue
        if job.target.startswith("gfx"):
            assert re.search(r"\.amdhsa_float_denorm_mode_32 3", code.assembly)
            assert re.search(r"\.amdhsa_float_denorm_mode_16_64 3", code.assembly)
        else:
            assert ".ftz" not in code.assembly


GOOD_PTX = """
    st.global.b32 [ %rd1 + 0 ], { %r1 };
    bar.sync 0;
    @%p5 atom.global.gpu.acq_rel.add.u32 %r2, [ %rd2 + 0 ], %r3;
    bar.sync 0;
    @%p6 ld.global.cg.b32 { %r4 }, [ %rd3 + 0 ];
"""
GOOD_AMDGCN = """
    global_store_dword v[0:1], v2, off
    s_waitcnt vmcnt(0)
    global_atomic_or v[0:1], v3, off
    s_waitcnt vmcnt(0)
    s_barrier
    global_atomic_add v0, v1, v2, s[0:1] sc0
    s_waitcnt vmcnt(0)
    buffer_inv sc1
    s_barrier
    global_load_dword v1, v2, s[2:3]
"""


def test_what_is_wrong_is_found():
    """The code without one of its steps, or with two of them in another order."""
    ptx = steps(GOOD_PTX, PTX)
    assert ptx == [STORE, BARRIER, TICKET, BARRIER, COHERENT_LOAD]
    assert takes_ticket_after_barrier(ptx, 2)
    assert not takes_ticket_after_barrier([STORE, TICKET], 1)
    assert not takes_ticket_after_barrier([BARRIER, STORE, TICKET], 2)
    assert steps(GOOD_PTX.replace("acq_rel", "relaxed"), PTX).count(TICKET) == 0
    assert reads_past_the_first_cache(ptx, 2, True)
    assert not reads_past_the_first_cache(steps(GOOD_PTX.replace(".cg", ""), PTX), 2, False)
    assert not reads_past_the_first_cache([*ptx, LOAD], 2, True)
    amdgcn = steps(GOOD_AMDGCN, AMDGCN)
    assert amdgcn == [STORE, WAIT, STORE, WAIT, BARRIER, TICKET, WAIT, INVALIDATE, BARRIER, LOAD]
    assert waits_before_barrier(amdgcn, 5)
    assert invalidates_the_cache(amdgcn, 5)
    assert not invalidates_the_cache([TICKET, BARRIER, INVALIDATE], 0)
    assert not waits_before_barrier([STORE, BARRIER, TICKET], 2)
    assert not waits_before_barrier([WAIT, STORE, BARRIER, TICKET], 3)


def test_every_kernel_that_counts_programs_takes_a_ticket_somewhere():
    """So that the test of what the last program reads sees each, on each kind of GPU."""
    for target in ("sm_90", "gfx942"):
        jobs = [job for job in JOBS if job.dtype == "float32" and job.target == target]
        assert {launch.name for job in jobs for launch in job.launches() if takes_tickets(launch)} == {
            "latent_forward_kernel", "latent_rows_kernel", "latent_columns_kernel",
            "reconstruction_forward_kernel", "reconstruction_rows_kernel", "reconstruction_backward_kernel",
            "jacobian_weight_kernel", "jacobian_penalty_kernel", "codebook_gather_kernel", "codebook_recheck_kernel",
            "logistic_mixture_kernel",
        }  # fmt: skip
