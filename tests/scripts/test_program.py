"""How commands end when they are interrupted; what they say, each command's own tests have."""

import signal
import subprocess
import sys

PROGRAM = """
import atexit, time
from scripts.program import run
atexit.register(time.sleep, 300)  # as a library whose end hangs
def main():
    print("begun", flush=True)
    time.sleep(300)
run(main, interrupted="all is kept")
"""


def test_a_second_signal_ends_what_hangs_at_its_end():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "interrupted by SIGTERM: all is kept\n"
        while process.poll() is None:  # the line is there a moment before a signal counts again
            process.send_signal(signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM
