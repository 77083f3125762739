"""Where keys and values lie, and how a step reads them: forms of one interface, `KVStore`.

ResidentStore on the device, ShardedStore with its tokens split over devices, HostStore in host memory, EvictingStore
for policies that evict.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["KVStore", "put_row", "write_token"],
        "evicting": ["EvictingStore"],
        "host": ["HostStore", "offload", "zeros_on_host"],
        "resident": ["ResidentStore"],
        "sharded": ["ShardedStore", "make_store"],
    },
)
