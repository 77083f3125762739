"""From scores to chosen tokens, under sinks, recent tokens and a budget. The choice itself is made only here.

The simulation chooses by `select_mask`, decoding by `choose`. Both count units in the same way, take the best of them
by the primitive of `pallas_kernels`, and add neighbours by the same function.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "budget": ["Limits", "beyond", "budget_table", "limits_of", "room_for"],
        "choices": [
            *("Chosen", "attended_tokens", "choose", "chosen_tokens", "kept", "share_counts", "with_recent"),
        ],
        "config": ["LIMITED", "Allocation", "AlwaysReadConfig", "SelectionConfig", "parse_budget"],
        "mass": ["WeighedUnits", "weigh_units"],
        "tail": ["TailSpans", "attend_spans"],
        "masks": ["Rows", "always_chosen", "best_in_unit", "select_best", "select_mask", "tied_share"],
    },
)
