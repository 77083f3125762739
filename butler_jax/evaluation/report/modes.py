"""How rows were evaluated: the allocation of reads between heads, the tail and the prompt, in labels and in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from butler_jax.evaluation.report.tables import Row, is_dense

ALLOCATIONS = {
    "per_head": "Every head of a layer reads its own budget.",
    "per_layer": "The heads of a layer share their budgets, and their tokens are ranked together.",
    "tolerance": "Every head of every layer reads the tokens whose score reaches one number. The number is set so that "
    "the mean that is read is about the budget.",
    "top_p": "Every head reads the fewest tokens whose estimated attention weights sum to p (Twilight, Lin et al. "
    "2025, arXiv 2502.02770). p is one number, set so that the mean that is read is about the budget.",
}

TAIL = "Keys that are not read are estimated by the mean keys and values of spans of {} tokens."


def label_allocations(rows: Iterable[Row]) -> list[Row]:
    """The rows with labels that name their allocation where it is not per_head."""
    return [{**r, "policy": _label(r)} for r in rows]


def _label(row: Row) -> str:
    allocation = row.get("allocation") or "per_head"
    known = allocation == "per_head" or allocation in row["policy"].split(":")
    return row["policy"] if known else f"{row['policy']}:{allocation}"


def describe_allocations(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The allocations and tails of a report, each with what it means; none where all read per head and have no tail."""
    found = dict.fromkeys(r.get("allocation") or "per_head" for r in rows if not is_dense(r["policy"]))
    tails = dict.fromkeys(r["tail"] for r in rows if r.get("tail"))
    said = [(name, words) for name, words in ALLOCATIONS.items() if name in found] if set(found) - {"per_head"} else []
    return said + [(f"tail={tail}", TAIL.format(tail)) for tail in tails]


def split_prompts(rows: Iterable[Row]) -> dict[int, list[Row]]:
    """The rows by the tokens of their prompts, the fewest first; under 0 those without a prompt."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("prompt_tokens") or 0, []).append(row)
    return {tokens: groups[tokens] for tokens in sorted(groups)}


def name_prompt(tokens: int) -> str:
    """'after a prompt of 256 tokens', or 'without a prompt'."""
    return f"after a prompt of {tokens:,} tokens" if tokens else "without a prompt"


def describe_prompt(task: str, tokens: int) -> str:
    """What the rows of a task have before them."""
    if task == "attention":
        return f"Rows of the first {tokens:,} tokens of each document do not count." if tokens else ""
    if task != "perplexity":
        return (
            "Everything before the answer is a prompt, of which all but the last token is read densely."
            if tokens
            else ""
        )
    if not tokens:
        return "There is no prompt: every row of a window is limited."
    return f"The first {tokens:,} tokens of each document are a prompt. They are read densely and do not count."
