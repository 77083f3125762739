"""Policies decide which tokens are read. Some score the tokens of a cache, others evict them.

A new policy is one more file and one more row of POLICIES.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["Policy", "describe"],
        "citrus": ["CItruS"],
        "dense": ["Dense"],
        "eviction": ["Evicting", "Place", "evict"],
        "h2o": ["H2O"],
        "lowrank": ["LowRank"],
        "oracle": ["Oracle", "OracleHead"],
        "quest": ["Quest"],
        "random": ["Random"],
        "registry": ["POLICIES", "make_policy", "settle_policy"],
        "residual": ["OracleResidual"],
        "scoring": [
            "Chunk",
            "Scoring",
            "estimate_weights",
            "largest_in_group",
            "normalise",
            "per_query_head",
            "scaled_products",
        ],
        "snapkv": ["SnapKV"],
        "streaming": ["Streaming"],
        "tokenbutler": ["TokenButler"],
    },
)
