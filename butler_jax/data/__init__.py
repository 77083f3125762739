"""Documents become batches: tokenised, packed, shuffled, sharded and resumable.

`sources` holds the documents and the generated tasks.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batches": ["anchor_spec", "read_held_out", "open_documents", "parse_spec", "read_batches"],
        "sources.asked_samples": ["AskedSample", "TooShortError"],
        "sources.coreference": ["last_mention_mask", "mention_distance", "sample"],
        "windows": [
            "Batch",
            "as_batch",
            "cut_text",
            "cut_windows",
            "find_counted",
            "pad_rows",
            "read_text",
            "require_batch",
            "require_batches",
        ],
    },
)
