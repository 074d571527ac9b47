"""The families of differential fuzzing: which function draws their cases."""

from collections.abc import Callable

from _fuzz import Draw, Trial
from _fuzz_codebooks import binary_entropy, moving_average, nearest, quantize, residual
from _fuzz_jacobians import contractive, jacobian
from _fuzz_losses import elbo, latent, logistic_mixture, reconstruction
from _fuzz_norms import group_norm, norm_act_conv, rms_norm, snake

# Each with its share of the cases of a run, and the public functions that it calls.
FAMILIES: dict[str, tuple[Callable[[Draw], Trial | None], int, tuple[str, ...]]] = {
    "latent": (latent, 5, ("reparameterize", "kl_normal", "reparameterize_kl")),
    "reconstruction": (reconstruction, 5, ("binary_cross_entropy_with_logits", "binary_cross_entropy", "mse_loss", "gaussian_nll")),
    "elbo": (elbo, 2, ("elbo_loss", "vae_loss")),
    "logistic_mixture": (logistic_mixture, 1, ("logistic_mixture_nll",)),
    "contractive_penalty": (contractive, 2, ("contractive_penalty",)),
    "jacobian_frobenius": (jacobian, 1, ("jacobian_frobenius", "explain_jacobian_method")),
    "group_norm": (group_norm, 2, ("group_norm_silu",)),
    "rms_norm": (rms_norm, 2, ("rms_norm_silu",)),
    "norm_act_conv": (norm_act_conv, 1, ("norm_act_conv",)),
    "snake": (snake, 2, ("snake",)),
    "nearest": (nearest, 2, ("vq_nearest",)),
    "quantize": (quantize, 2, ("vector_quantize",)),
    "residual_quantize": (residual, 1, ("residual_quantize",)),
    "moving_average": (moving_average, 2, ("codebook_ema_update_",)),
    "binary_entropy": (binary_entropy, 1, ("binary_code_entropy",)),
}
