"""The base of all likelihoods, which checks the decoder's output and reduces."""

import torch
from torch import Tensor, nn

from fastvae._backend import FLOATS
from fastvae._types import Reduction
from fastvae.distributions._options import Stored
from fastvae.functional._checks import check_device, check_interval, check_tensor
from fastvae.functional._documentation import documented
from fastvae.ops._results import accumulation_dtype, reduction_number
from fastvae.reference._reduce import reduce_elements
from fastvae.reference.reconstruction import promote


class Likelihood(Stored, nn.Module):
    r"""The base of all likelihoods: :math:`p(x | z)` as a function of what a decoder gives for :math:`z`.

    A decoder gives ``params`` of shape ``(batch, parameters_per_element * channels, ...)`` for data ``x`` of shape
    ``(batch, channels, ...)``: all channels of the first parameter, then all of the second, and so on. Both have any floating dtype; ``x``
    may be uint8, which means value / 255. A subclass says where it takes other data.

    A call gives the negative log-likelihood in nats. ``params`` and the parameters of the module receive gradients.

    A subclass defines :meth:`elements`, :meth:`mean` and :meth:`sample`; one with a fused kernel overrides :meth:`loss` instead of
    :meth:`elements`.

    Attributes:
        parameters_per_element: how many numbers the decoder gives for one number of ``x``.
        data_dtypes: the dtypes that ``x`` may have.
        support: the least and the largest value that ``x`` may have, which :meth:`check_range` checks.
    """

    parameters_per_element: int = 1
    data_dtypes: tuple[torch.dtype, ...] = (*FLOATS, torch.uint8)
    support: tuple[float, float] = (-torch.inf, torch.inf)

    @documented
    def forward(self, params: Tensor, x: Tensor, *, reduction: Reduction = "batchmean") -> Tensor:
        """The negative log-likelihood of ``x`` in nats.

        Args:
            params: what the decoder gives.
            x: the data. Values outside the distribution's support are not checked here, which would wait for the device: see
                :meth:`check_range`.
            $reduction

        Returns:
            The loss; for ``"none"`` in the dtype that ``params`` and ``x`` promote to (integers do not count), else in float32 (float64
            where either is). 0 for an empty batch.

        Raises:
            TypeError, ValueError: for an argument that does not fit, naming it; for a wrong number of parameters it names the decoder.
        """
        self.check(params, x)
        return self.loss(params, x, reduction)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """log p(x | z) of each sample in nats, shape ``(batch,)``."""
        return -self(params, x, reduction="sample")

    def mean(self, params: Tensor) -> Tensor:
        """The mean of p(x | z), in the shape and the range of the data."""
        raise NotImplementedError(f"{type(self).__name__} defines no mean")

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw from p(x | z), in the shape and the range of the data, without a gradient.

        Args:
            params: what the decoder gives.
            generator: a generator on the device of ``params``; by default torch's own.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no sample")

    def elements(self, params: Tensor, x: Tensor) -> Tensor:
        """The negative log-likelihood of each element of ``x``, in the dtype of sums (:func:`loss_dtype`)."""
        raise NotImplementedError(f"{type(self).__name__} defines no elements")

    def loss(self, params: Tensor, x: Tensor, reduction: Reduction) -> Tensor:
        """The result of a call, for arguments that have been checked."""
        number = reduction_number(reduction)
        return reduce_elements(self.elements(params, x), number, promote(params, x))

    def split(self, params: Tensor) -> tuple[Tensor, ...]:
        """The decoder's output as one tensor for each parameter, each in the shape of the data."""
        self.check_count(params)
        return params.chunk(self.parameters_per_element, dim=1) if self.parameters_per_element > 1 else (params,)

    def check_count(self, params: Tensor) -> None:
        """Raises where the decoder's output cannot be that for any data."""
        check_tensor("params", params)
        count = self.parameters_per_element
        if count > 1 and (params.ndim < 2 or params.shape[1] % count):
            raise ValueError(
                f"decoder: gave shape {tuple(params.shape)}, has to give a multiple of {count} in dimension 1, "
                f"the parameters per element of {type(self).__name__}"
            )

    def parameters_for(self, channels: int) -> int:
        """The size of dimension 1 of what the decoder gives for data of so many channels."""
        return self.parameters_per_element * channels

    def params_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape that the decoder's output has to have for data ``x``."""
        if self.parameters_per_element == 1:
            return tuple(x.shape)
        if x.ndim < 2:
            raise ValueError(f"x: got shape {tuple(x.shape)}, {type(self).__name__} takes (batch, channels, ...)")
        return (x.shape[0], self.parameters_for(x.shape[1]), *x.shape[2:])

    def check(self, params: Tensor, x: Tensor) -> None:
        """Raises where the dtype, the device or the shape of an argument does not fit."""
        check_tensor("params", params)
        check_tensor("x", x, self.data_dtypes)
        check_device("x", x, "params", params)
        expected = self.params_shape(x)
        if params.shape != expected:
            raise ValueError(
                f"decoder: gave shape {tuple(params.shape)}, has to give {expected} for x of shape {tuple(x.shape)}: "
                f"{type(self).__name__} has {self.parameters_per_element} parameters_per_element"
            )

    def check_range(self, x: Tensor) -> None:
        """Raises ``ValueError`` where a value of ``x`` is outside ``support`` (NaN is): a device synchronisation, so a call omits it."""
        check_tensor("x", x, self.data_dtypes)
        low, high = self.support
        if x.dtype != torch.uint8:
            check_interval("x", x, low, high)


def loss_dtype(params: Tensor, x: Tensor) -> torch.dtype:
    """The dtype in which elements are computed and summed: float32, float64 where either argument is."""
    return accumulation_dtype(promote(params, x))


def as_values(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Data in ``dtype``; an 8-bit image as value / 255."""
    return x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)
