"""From scores to chosen tokens: the only package that knows sinks, recent tokens, budgets and ties.

The simulation and decoding choose through the same functions.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "budget": ["Limits", "beyond", "budget_table", "limits_of", "room_for"],
        "chosen": ["attended_tokens", "chosen_tokens", "kept", "recent_from", "with_recent"],
        "config": ["AlwaysReadConfig", "SelectionConfig", "parse_budget"],
        "masks": ["Rows", "always_chosen", "choose", "select_mask"],
        "top_k": ["Chosen", "compact", "from_bits", "ordered_bits", "top_mask"],
    },
)
