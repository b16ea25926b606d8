import platform
import sys

import pytest

from tests.processes import finish

SCRIPT = """
import resource
import threading
import numpy as np
from flaxnets.cli.memory import keep_memory

if {keep}:
    keep_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(16_000_000, np.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def work():
    faults()
    print(faults())

# In another thread, as XLA does it: glibc would give it an arena of its own.
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_freed_memory_is_used_again():
    pages = {}
    for keep in (True, False):
        status, out, err = finish(sys.executable, "-c", SCRIPT.format(keep=keep))
        assert status == 0, err
        pages[keep] = int(out)
    assert pages[True] < 100
    assert pages[False] > 20 * max(pages[True], 1)
