"""Pools of processes: what a member inherits, and that none outlives the process that made it."""

import os
import signal
import subprocess
import sys
import time

import psutil

from persona_coupling import processes

PARENT = """
import os, time
from persona_coupling import processes

if __name__ == "__main__":
    with processes.pool(2) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600)
        time.sleep(600)
"""


def test_members_end_with_a_killed_parent(tmp_path):
    """Those at work and those that wait for it: a run that was killed leaves no process, and no memory of a card in use."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        member = psutil.Process(int(parent.stdout.readline()))
        members = [
            child for child in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(child.cmdline())
        ]
        assert member in members
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.communicate()
    gone, alive = psutil.wait_procs(members, timeout=20)
    assert not alive
    assert len(gone) == len(members)


def test_members_run_the_initialiser_and_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    with processes.pool(2, time.sleep, (0.0,), beside=1) as pool:
        assert pool.submit(os.getenv, processes.BLAS[0]).result() == "2"
