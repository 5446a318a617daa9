"""Divergences of a `Pair` of log-probabilities, one value a position; one file is one divergence.

Legend: `N` positions, `O` outcomes.

Each is 0 where both sides agree. All but `adaptive_kl` are f-divergences, sums of one term per outcome: merging
outcomes never raises them, so the tail policy `bucket` gives a lower bound, and `sampled` an unbiased estimate.
All but `total_variation` are in nats. They compute in the dtype of the pair, which the tail policies make float32
at least.
"""
