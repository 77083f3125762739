"""Raw scores against their formula, with the newest token among them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from butler_jax.decoding.newest_tokens import newest_of
from butler_jax.decoding.scoring import raw_scores, with_own_score
from tests.decoding.letters import BASE


def test_raw_scores_are_products_over_the_root_of_the_rank():
    random = np.random.default_rng(0)
    q_imp, k_imp = random.normal(size=(1, 2, 4, 8)).astype(np.float32), random.normal(size=(1, 2, 2, 8, 5))
    k_imp, own = k_imp.astype(np.float32), random.normal(size=(2, 2, 8)).astype(np.float32)
    scores = raw_scores(jnp.asarray(q_imp), jnp.asarray(k_imp))[0]
    wanted = np.einsum("bqgr,bqrs->bqgs", q_imp[0].reshape(2, 2, 2, 8), k_imp[0]) / np.sqrt(8)
    np.testing.assert_allclose(scores, wanted, atol=1e-5)  # float32 sums in another order; scores are about 1
    found = with_own_score(scores, jnp.asarray(q_imp[0]), jnp.asarray(own), newest_of(BASE, jnp.asarray([3, 0])))
    for b, place in enumerate((3, 0)):
        wanted[b, ..., place] = np.einsum("qgr,qr->qg", q_imp[0, b].reshape(2, 2, 8), own[b]) / np.sqrt(8)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
