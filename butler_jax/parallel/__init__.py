"""Devices and processes: meshes, sharding rules, and several hosts that run as one.

Only `mesh` names mesh axes. A computation asks for a rule by the names of its dimensions.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["HostsConfig", "parse_hosts"],
        "heartbeats": ["lost"],
        "hosts": ["agree", "check_shared", "gather", "join_hosts", "leave"],
        "mesh": [
            "EVALUATION_RULES",
            "RULES",
            "Rules",
            "any_process",
            "by_rows_and_heads",
            "check_batch",
            "constrain",
            "constrain_module",
            "current_mesh",
            "hash_arrays",
            "make_mesh",
            "map_shards",
            "module_shardings",
            "on_host",
            "own_rows",
            "partition",
            "place",
            "place_batch",
            "platform",
            "rows_here",
            "shard_index",
            "shardings_for",
            "splitting_axes",
            "sum_shards",
            "token_axis",
        ],
        "memory": ["memory_of"],
        "messages": ["exchange", "stand_alike", "tell", "told", "try_to_tell"],
        "signals": ["answered"],
    },
)
