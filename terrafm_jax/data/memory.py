"""Memory of batches: kept for reuse by the process, and given back at its end."""

from __future__ import annotations

import ctypes
import gc
from functools import lru_cache


@lru_cache(maxsize=1)
def keep_memory() -> None:
    """Tells glibc to keep up to 512 MB of freed memory of this process; elsewhere it does nothing.

    Tiles of some megabytes come and go, and by default each of them gets fresh pages from the kernel:
    that took a fifth of the time of preparation and nearly half of that of reading.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its upper limit
        libc.mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library: slower, not wrong
        return


def free_batches() -> None:
    """Frees the batches that nothing uses any more, before the process ends and Python reports shared memory as leaked.

    JAX lets go of the last batches (on CPU, of the workers' own arrays) at a garbage collection. Grain then frees them
    one after the other on a thread that the end of the process would stop; what is put to that thread last, comes last.
    """
    from grain.multiprocessing import SharedMemoryArray

    gc.collect()
    freeing = getattr(SharedMemoryArray, "_del_thread_pool", None)  # no public name; None without workers
    if freeing is not None:
        freeing.apply(int)
