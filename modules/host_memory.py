"""Memory of a process on a CPU under Linux, of which the C library and the kernel make less than they could."""

import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MADV_DONTNEED = 4  # of sys/mman.h
BLOCK, REST = 2**25, 2**29
SECTION = re.compile(r"^(?=[0-9a-f]+-[0-9a-f]+ )", re.MULTILINE)  # of /proc/PID/smaps, one to a mapping
OWN_PAGES = re.compile(r"^(?:Anonymous|Swap): +(\d+) kB", re.MULTILINE)  # those that are no longer the file's


def keep_freed_memory() -> None:
    """Let blocks of up to 32 MiB come from the heap, and let up to 512 MiB at its end stay when they are freed.

    glibc maps many blocks anew each time, and the kernel fills every page of them with zeros: gradients and activations
    of a model of 135 million parameters cost a tenth of a training's time that way. With blocks of any size on the heap
    it would not find room for the largest between the others, and grow without end. It holds for the whole process, and
    does nothing where the C library is another. Source: mallopt(3).
    """
    mallopt = _of_the_c_library("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, BLOCK)
        mallopt(M_TRIM_THRESHOLD, REST)


def let_go_of_files() -> None:
    """Hand the pages of weights that lie in their files as they were written back to the kernel.

    Weights in the dtype of their .safetensors file are not read, but mapped: the kernel brings a page when it is used
    first. Frozen networks never write to them, so the process need not hold them between their uses. The kernel keeps
    them as long as nobody else needs the memory, once for all processes of a machine. Source: madvise(2).
    """
    advise = _of_the_c_library("madvise")
    for start, end in clean_weights() if advise is not None else ():
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def clean_weights() -> Iterator[tuple[int, int]]:
    """First and last address of each .safetensors file that is mapped into this process, and not written to by it."""
    if ".safetensors" not in Path("/proc/self/maps").read_text():  # the other takes the kernel ten times as long
        return
    for mapping in SECTION.split(Path("/proc/self/smaps").read_text()):
        header, _, fields = mapping.partition("\n")
        if ".safetensors" in header and not any(map(int, OWN_PAGES.findall(fields))):
            start, end = header.split()[0].split("-")
            yield int(start, 16), int(end, 16)


def _of_the_c_library(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
