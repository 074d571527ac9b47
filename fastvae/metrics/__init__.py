"""Metrics of autoencoders, their latents and their samples: needs the extra ``metrics``.

Each is a ``torchmetrics.Metric``, with statistics in float64, bounded memory, and a result that does not depend on the sizes of batches,
their order or the number of processes; ``_samples`` is the base of those that need their samples at the end.

What latents hold: ``active_units``, ``information``, ``codebook_usage``, ``rate_distortion``. How they follow known factors: ``mig``,
``dci``, ``sap``, ``modularity``, ``intervention_scores``, and ``shapes``, images with such factors. How good samples are: ``generation``
and ``inception_score`` over ``features`` and ``lenet``. What a model is used for: ``anomaly``, ``completion``, ``downstream``, and
``molecules``, which needs the extra of that name.
"""
