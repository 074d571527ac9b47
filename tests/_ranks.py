"""Two processes joined by gloo, which run the same function at the same time: ``ranks.run(function, ...)`` gives what each returned.

The process group outlives what the functions make. Where the last reference to a group is that of a DistributedDataParallel, torch's
destructor waits for a thread that waits for the interpreter's lock, now and then for ever.
"""

import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing

WORLD_SIZE = 2
# A collective call that one process alone makes raises after this time; nothing here takes as long.
TIMEOUT = timedelta(seconds=30)


def _serve(rank: int, store: str, pipe) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE, timeout=TIMEOUT)
    while (work := pipe.recv()) is not None:
        function, arguments = work
        try:
            pipe.send((True, function(rank, *arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    distributed.destroy_process_group()


class Ranks:
    """The processes; ``run`` calls ``function(rank, *arguments)`` in each."""

    def __init__(self, folder: Path):
        self.folder, self.started, self.processes = folder, 0, []

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.started += 1
        store = str(self.folder / f"store{self.started}")
        pipes = [context.Pipe() for _ in range(WORLD_SIZE)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [context.Process(target=_serve, args=(rank, store, pipes[rank][1]), daemon=True) for rank in range(WORLD_SIZE)]
        for process in self.processes:
            process.start()

    def run(self, function, *arguments) -> list:
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() if pipe.poll(2 * TIMEOUT.total_seconds()) else (False, "no answer") for pipe in self.pipes]
        failures = [f"rank {rank}: {result}" for rank, (succeeded, result) in enumerate(answers) if not succeeded]
        if failures:
            # The two are out of step.
            self.kill()
        assert not failures, "\n".join(failures)
        return [result for _, result in answers]

    def close(self) -> None:
        for pipe in self.pipes if self.processes else ():
            pipe.send(None)
        for process in self.processes:
            process.join(TIMEOUT.total_seconds())
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.processes = []


@contextmanager
def two_ranks(folder: Path):
    ranks = Ranks(folder)
    try:
        yield ranks
    finally:
        ranks.close()
