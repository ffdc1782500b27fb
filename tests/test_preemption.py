"""SIGTERM is taken once; the second ends the process as ever."""

import os
import signal
import subprocess
import sys
import threading

from unifluid_jax.preemption import Notice


def test_a_notice_is_remembered_and_what_was_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with Notice() as notice:
        assert not notice.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.requested
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_one_ends_the_process():
    program = (
        "import os, signal, time; from unifluid_jax.preemption import Notice\n"
        "with Notice() as notice:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(notice.requested, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(600)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "True\n")


def test_another_thread_trains_without():
    before, found = signal.getsignal(signal.SIGTERM), []

    def body():
        with Notice() as notice:
            found.append((signal.getsignal(signal.SIGTERM), notice.requested))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [(before, False)]
