"""Reading and writing files: files that appear whole or not at all, checked JSON, and settings as JSON objects.

Every other package of butler_jax may import this one.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "compilation_cache": ["choose_cache", "default_cache", "prepare_cache", "use_compilation_cache"],
        "files": ["file_in", "open_regular", "sync", "write_whole", "writing"],
        "json_objects": ["parse_object", "read_lines", "read_object", "read_value"],
        "settings": [
            "expand_home",
            "from_dict",
            "require_local",
            "require_positive",
            "settle_types",
            "split_list",
            "to_dict",
        ],
        "values": ["deeper", "fits", "number", "shown", "whole"],
    },
)
