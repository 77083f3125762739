"""Text becomes token ids, and token ids become text.

Prompts become rows of ids. Generated tokens become text piece by piece.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "chat_template": ["ChatTemplate", "ChatTemplateError", "Messages", "read_templates"],
        "prompts": ["Prompts", "Stop", "Writer", "encode", "encode_prompt", "read_stops"],
        "tokenizer": ["Tokenizer", "named_errors", "train_bpe"],
    },
)
