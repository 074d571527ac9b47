"""The quantizer of taming-transformers against its formulas."""

import pytest
import torch
import torch.nn.functional as F

from fastvae.compat import VectorQuantizer


@pytest.mark.parametrize("legacy", [False, True])
def test_taming_quantizer(legacy):
    quantizer, z = VectorQuantizer(12, 4, 0.25, legacy=legacy), torch.randn(2, 4, 3, 5, requires_grad=True)
    z_q, loss, (perplexity, encodings, indices) = quantizer(z)
    flat = z.movedim(1, -1).reshape(-1, 4)
    nearest = torch.cdist(flat, quantizer.embedding.weight).argmin(1)
    codes = quantizer.embedding(nearest)
    toward_codes, toward_z = F.mse_loss(flat, codes.detach()), F.mse_loss(codes, flat.detach())
    expected = toward_codes + 0.25 * toward_z if legacy else 0.25 * toward_codes + toward_z
    assert torch.equal(indices, nearest)
    assert encodings is None
    assert 1 <= perplexity <= 12
    torch.testing.assert_close(z_q, codes.view(2, 3, 5, 4).movedim(-1, 1))
    torch.testing.assert_close(quantizer.get_codebook_entry(indices, (2, 3, 5, 4)), z_q)
    # Code around the original calls .view() on them.
    assert all(t.is_contiguous() for t in (z_q, indices, quantizer.get_codebook_entry(indices, (2, 3, 5, 4))))
    leaves = (z, quantizer.embedding.weight)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(loss, expected)
