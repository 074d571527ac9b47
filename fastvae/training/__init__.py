"""Training: needs the extra ``train``.

The training itself is :mod:`fastvae.training.module` (the LightningModule), with ``optimizers``, ``adversarial``, ``preprocessing`` and
``activations``.
Data come from ``datasets`` (the data modules) over ``data_module``, ``sources``, ``images`` and ``splits``. Pictures, curves and averaged
weights are ``callbacks`` over ``latents`` and ``pictures``; ``pretraining`` trains stages one after the other. The command line is ``cli``
(fit, validate, test) and ``commands`` (what needs a checkpoint alone), with ``networks``, ``parsing``, ``checkpoints`` and
``checkpoint_io``; ``explorer`` is the page of ``fastvae explore``. The demonstration is ``demo``: its trainings are ``experiment`` and
``comparison``, its measurements ``headline`` over ``plain_torch``, its pictures ``plots``.
"""
