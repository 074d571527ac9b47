"""The package's operators in torch's own, for what runs models without this package.

``torch.onnx.export(model, ..., dynamo=True)`` needs none of this: while it traces, calls give torch's own operators. What it gets as an
``ExportedProgram``, and every other consumer of one, takes :func:`decompositions`.
"""

from collections.abc import Callable

from fastvae import ops

__all__ = ["decompositions"]


def decompositions() -> dict[Callable, Callable]:
    """Each operator of the package, in the form of every backend, in torch's own operators.

    For ``torch.export.ExportedProgram.run_decompositions``, whose result then runs without the package::

        program = torch.export.export(model, arguments)
        program = program.run_decompositions(fastvae.export.decompositions())

    To decompose torch's operators too, add them: ``torch.export.default_decompositions() | fastvae.export.decompositions()``.

    Arithmetic is in float32 (float64 for float64), that of the search for nearest codes in float64: there two distances that differ by less
    than its rounding count as equal. Noise is the one that the package draws from the same seed.

    Returns:
        A new dictionary from overloads to functions of their arguments.
    """
    return {op.overloads[backend]: op.in_torch_operators for op in ops.OPERATORS.values() for backend in ops.BACKENDS}
