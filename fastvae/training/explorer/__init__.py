"""``fastvae explore``: a page in the browser for looking around in a model's latent space. The page needs the extra ``explore``.

``latent_space`` computes the images and ``uploads`` reads those of the user, both without the page; ``page`` lays them out, and ``server``
is the command.
"""
