"""Devices and processes: meshes, sharding rules, and several hosts that run as one.

Only `mesh` names mesh axes. A computation asks for a rule by the names of its dimensions.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["HostsConfig", "parse_hosts"],
        "hosts": ["agree", "check_shared", "gather", "join_hosts", "leave", "lost"],
        "mesh": [
            "any_process",
            "by_rows_and_heads",
            "check_batch",
            "constrain",
            "constrain_module",
            "current_mesh",
            "make_mesh",
            "module_shardings",
            "on_host",
            "own_rows",
            "partition",
            "place",
            "place_batch",
            "platform",
            "rows_here",
            "shardings_for",
            "token_axis",
        ],
    },
)
