"""The cross entropy between a frozen layer's attention and the softmax of a predictor's scores."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float, Int

from butler_jax.model import attention
from butler_jax.parallel import platform
from butler_jax.training.losses.arrays import check_shapes, scale_gradients
from butler_jax.training.losses.contested_keys import KeyRange
from butler_jax.training.losses.fused_pass import run_fused
from butler_jax.training.losses.target import ErrorRule, ErrorTarget
from butler_jax.training.losses.two_calls import run_two_calls

FORMS = ("fused", "two_calls")
ERROR_FORMS = ("fused", "flash")
"""Forms where the target is an error in the residual stream."""


def attend_with_cross_entropy(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    q_imp: Float[Array, "B T H R"],
    k_imp: Float[Array, "B T Q R"],
    *,
    segments: Int[Array, "B T"] | None = None,
    sliding_window: int | None = None,
    sinks: int = 0,
    recent: int = 0,
    softcap: float | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    implementation: str | None = None,
    form: str | None = None,
    target: ErrorTarget | None = None,
    rule: ErrorRule | None = None,
    chosen: int | float | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, ""], Float[Array, ""]]:
    """The layer's attention output and the cross entropy of a predictor's scores.

    Let A = softmax(q.k / sqrt(D)) over the causal keys of a row's document, and B = softmax(q_imp.k_imp / sqrt(R)) over
    the contested ones among them. The loss of the row is -sum_j A_ij log B_ij over the contested keys j. With sinks and
    recent of 0 every key is contested, and this is the loss of TokenButler (arXiv 2503.07518, second version), which
    samples rows. Here every row counts that has a contested key and is not padding.

    The attention has the soft cap and the sinks of `model.causal_attention`. A sink takes its share of A, so a row's
    loss weighs as much as its attention to contested keys.

    Only q_imp and k_imp get gradients; the output carries none.

    Rows that do not count add nothing to the loss and its gradients. With "fused" neither do rows whose true logits are
    all -inf. True logits of NaN or +inf give a loss that is not finite, and so do scores of -inf where the attention is
    positive.

    Args:
        q: Queries after rotary; k, v: keys after rotary and values. The frozen model's.
        q_imp, k_imp: The predictor's queries and keys. k_imp has the K KV heads or all H query heads.
        segments: The document of each token, 0 for padding. None: one document a row.
        sinks, recent: How many first tokens of a document and newest tokens of a row are always read, and not
            contested.
        softcap, sink_logits: Of the attention, as in `model.causal_attention`.
        implementation: Of the attention, as in `model.causal_attention`.
        form: "fused" (XLA only) makes one pass over chunks of 128 query rows. "two_calls" calls attention kernels with
            k_imp among the values, for attention weights as the target. "flash" calls kernels for TPU, for errors as
            the target; they are interpreted (slowly) on CPU. None takes the form that suits the implementation.
        target, rule: Errors in the residual stream as the target in the place of A. Then the offset of the target has
            a gradient too. With an implementation of None they take "splash" on TPU and "xla" elsewhere. A key
            that stands for n counts as n equal keys in A and in B, and not in the output.
        chosen: The budget of a row, as of `SelectionConfig`. Only the contested keys count then that the scores choose
            under it, per head, and B is the softmax over these (the second stage of DeepSeek-V3.2's indexer, arXiv
            2512.02556, section 2.1). The target is what A, or the error, is there. It takes the form "fused".

    Returns:
        The output [B, T, H, D]; the loss summed over rows and heads, in nats; and the number of rows times heads.

    Raises:
        ValueError: For shapes that do not fit, or an implementation that cannot do what was asked.
    """
    check_shapes(q, k, v, q_imp, k_imp, segments, sliding_window)
    if min(sinks, recent) < 0:
        raise ValueError(f"sinks and recent must be 0 or more, got {sinks} and {recent}")
    if implementation is None and (chosen is not None or (target is not None and platform() != "tpu")):
        implementation = "xla"
    terms = {"softcap": softcap, "sink_logits": sink_logits}
    name = attention.choose_implementation(implementation, q, q.shape[-1], segments, **terms)
    form = _choose_form(form, name, of_errors=target is not None)
    if chosen is not None and form != "fused":
        raise ValueError(
            f'the keys that scores choose are found by the form "fused", not by {form!r}; take "xla" attention, or '
            "leave out chosen"
        )
    keys = KeyRange(sliding_window, sinks, recent, chosen)
    arrays = (q, k, v, q_imp, k_imp, target, segments, sink_logits)
    output, loss, count = _cross_entropy(*arrays, keys, form, name, rule, softcap)
    return jax.lax.stop_gradient(output), loss, jax.lax.stop_gradient(count)


def _choose_form(form: str | None, implementation: str, *, of_errors: bool) -> str:
    """The form to run. Raises ValueError where the named one does not fit the target, the attention or the device."""
    forms, what = (ERROR_FORMS, "errors") if of_errors else (FORMS, "attention weights")
    form = form or ("fused" if implementation == "xla" else forms[1])
    if form not in forms:
        raise ValueError(f"form {form!r} is unknown for a target of {what}; use None or one of {forms}")
    if form == "fused" and implementation != "xla":
        raise ValueError(f'form "fused" runs on "xla" only, not on {implementation!r}; use {forms[1]!r} or None')
    if form == "flash" and platform() == "gpu":
        raise ValueError('the form "flash" is for TPU, the platform is gpu; use "xla" attention for a target of errors')
    return form


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10, 11, 12))
def _cross_entropy(q, k, v, q_imp, k_imp, target, segments, sink_logits, *static):
    return _run(q, k, v, q_imp, k_imp, target, segments, sink_logits, *static, differentiate=False)[0]


def _cross_entropy_forward(q, k, v, q_imp, k_imp, target, segments, sink_logits, *static):
    arrays = (q, k, v, q_imp, k_imp, target, segments, sink_logits)
    results, dq_imp, dk_imp, doffset = _run(*arrays, *static, differentiate=True)
    of_target = None if target is None else doffset.astype(target.offset.dtype)
    return results, (dq_imp.astype(q_imp.dtype), dk_imp.astype(k_imp.dtype), of_target)


def _cross_entropy_backward(keys, form, implementation, rule, softcap, gradients, cotangents):
    dq_imp, dk_imp, doffset = (None if g is None else scale_gradients((g,), cotangents[1])[0] for g in gradients)
    return None, None, None, dq_imp, dk_imp, None if doffset is None else ErrorTarget(None, None, doffset), None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _run(
    q, k, v, q_imp, k_imp, target, segments, sink_logits, keys, form, implementation, rule, softcap, *, differentiate
):
    """Results and float32 gradients in the form asked for."""
    arrays = (q, k, v, q_imp, k_imp, segments, keys)
    options = dict(differentiate=differentiate, softcap=softcap, sink_logits=sink_logits)
    if form == "fused":
        return run_fused(*arrays, target=target, rule=rule, **options)
    if form == "flash":
        from butler_jax.training.losses.flash_pass import run_flash  # Pallas takes a while to import

        return run_flash(*arrays, implementation=implementation, target=target, rule=rule, **options)
    return *run_two_calls(*arrays, implementation=implementation, **options), None
