"""What the tests of modules share: hooks, and one process that shards as many would."""

from contextlib import contextmanager

from torch import distributed, nn


@contextmanager
def one_process():
    """A process group of this process, for DTensor."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def shard(layer: nn.Module) -> nn.Module:
    """Makes the parameters of a layer DTensors."""
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    return distributed.tensor.distribute_module(layer, mesh)


def double_output(module, inputs, output):
    return 2 * output


def double_input(module, inputs):
    return (2 * inputs[0],)
