"""Rotation of the residual stream (QuaRot, Ashkboos et al., 2024; arXiv:2404.00456), fused into the weights.

A model whose norms stand in front of its layers reads its residual stream x through norms only, and writes it by sums
only.  So with an orthogonal Q all of it can live in another basis, x' = Q x:

    tables   E' = E Qᵀ                      what is summed into the stream at its beginning
    writers  W' = Q W,  b' = Q b            o, down, fc2: what is added to it
    norms    n(Q x) = Q n(x)                once their gains γ and biases β have moved on
    readers  W' = W diag(γ) Qᵀ,  b' = b + W β   q, k, v, gate, up, fc1, router, head

RMSNorm turns with any Q.  LayerNorm also subtracts the mean over the channels.  QuaRot and SliceGPT (arXiv:2401.15024)
put an RMSNorm in its place, for which the writers are centered first; the result is another architecture.  Here Q is
chosen such that Q1 = 1: then the mean of Q x is that of x, and LayerNorm turns with Q as it is.  Writers are centered
too, since no one sees their mean.

Where a reader of a LayerNorm has no bias to take W β (the head of GPT-2), the norm keeps a bias that is the same in all
channels, c1, and W gets it from there: normalized vectors have no part along 1, so W' (I − 11ᵀ/n) + (W β / cn) 1ᵀ reads
W β in c1, and nothing else of it.

A head that shares its weight with the embeddings gets one of its own, as γ of the last norm is in it.

None of it is taken for granted: the model is run with random tokens before and after, block by block.
"""

from .rewrite import rotated, untied

__all__ = ["rotated", "untied"]
