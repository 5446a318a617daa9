"""Losses of `Heads`: raw logits of both sides and labels, one value a position; one file is one loss.

Legend: `N` positions, `K` kept entries, `V` vocabulary, `b = 1/T`.

Each computes in the values' dtype, float32 at least, and binds a `Response` that says whether T softens it, whether
it needs whole rows (K = V), and whether it needs labels.
"""
