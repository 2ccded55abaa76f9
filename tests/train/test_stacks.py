"""Stacks on request, from a process whose main thread waits and whose others work."""

import signal
import subprocess
import sys
import threading

import pytest
import runs

# A second lock of a plain mutex waits for ever, whatever signal comes; Python's own lock is free.
WAITING = """
import ctypes, threading
from ovseg_jax.train.stacks import print_stacks_on_signal

def work(depth=0):
    while True:
        [deeper(n) for n in range(9)]

def deeper(n):
    return n and deeper(n - 1)

def stuck():
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    library.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    library.pthread_mutex_lock(mutex)

print_stacks_on_signal()
threading.Thread(target=work, daemon=True).start()
stuck()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="zeros are a mutex on Linux")
def test_stacks_of_a_main_thread_that_waits_beside_one_that_works():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    ended = threading.Timer(60, process.kill)  # a reader below would wait for ever
    ended.start()
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(3):
            process.send_signal(signal.SIGUSR1)
            said = ""
            while "in stuck" not in said:
                line = process.stderr.readline()
                assert line, f"ended with {process.wait()}: {said}"
                said += line
            assert process.poll() is None
        for _ in range(200):
            process.send_signal(signal.SIGUSR1)
        assert process.poll() is None
    finally:
        ended.cancel()
        process.kill()
        process.communicate()
