"""Decodes images tile by tile, without seams."""

from fastvae.models.tiling._tiled import TiledVAE, tiled

__all__ = ["TiledVAE", "tiled"]
