"""Kernels of several processes on one GPU at the same time.

Without help a GPU runs one process's kernels at a time and changes between processes every few milliseconds, so that
small kernels of one leave the card idle for the others. NVIDIA's Multi-Process Service runs them side by side
(docs.nvidia.com/deploy/mps). What is computed is the same. A service of our own, with its pipes in a folder of its own,
is started for a pool of workers and stopped with it; the card's settings are left as they are.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from persona_coupling import processes

CONTROL = "nvidia-cuda-mps-control"
PLACES = ("/usr/local/nvidia/bin", "/usr/local/cuda/bin")  # where images keep it outside of PATH
PIPES = "CUDA_MPS_PIPE_DIRECTORY"
LOGS = "CUDA_MPS_LOG_DIRECTORY"
PRIORITY = "CUDA_MPS_CLIENT_PRIORITY"  # 0: normal, 1: below; read when a process first uses the card
PATIENCE = 5.0  # seconds for the service to listen, and to end
VISIBLE = "CUDA_VISIBLE_DEVICES"
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl


@contextmanager
def service(device: str, workers: int, say: Callable[[str], object] = lambda _line: None) -> Iterator[bool]:
    """Processes that are started inside share the GPU through a service of ours. Yields whether they do: not on a CPU, for
    one worker, where the driver has no such program, or where it does not come up; a service that the environment
    names already is used as it is."""
    control = shutil.which(CONTROL, path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
    if not device.startswith("cuda") or workers < 2 or control is None:
        yield False
        return
    if os.environ.get(PIPES):
        yield True
        return
    folder = Path(tempfile.mkdtemp(prefix="mps-"))  # short: a socket's path has at most 107 characters
    names = {PIPES: str(folder), LOGS: str(folder), VISIBLE: _by_name()}
    try:
        with processes.environment(names):
            daemon = _started(control, folder)
            if daemon is not None:
                try:
                    yield True
                finally:
                    _end(control, daemon)
                return
        say("The GPU's multi-process service did not start: workers take turns on the card, which is slower.")
        yield False
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def give_way() -> None:
    """From now on, if this process has not used the card yet, its kernels are started behind those of other clients."""
    os.environ[PRIORITY] = "1"


def _by_name() -> str:
    """The visible GPUs by their names: numbers would be counted anew by the service's clients, among what it sees."""
    import torch

    return ",".join(f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count()))


def _with_parent() -> None:
    """In the service before it starts: end when the process that started us is killed."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGTERM)


def _started(control: str, folder: Path) -> subprocess.Popen[bytes] | None:
    """The service, once it listens in `folder`; None, and nothing left of it, if it does not."""
    null = subprocess.DEVNULL
    try:  # in a session of its own: Ctrl-C is for us, and workers need the service until they have ended
        daemon = subprocess.Popen(
            [control, "-f"], stdin=null, stdout=null, stderr=null, start_new_session=True, preexec_fn=_with_parent
        )
    except OSError:
        return None
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and daemon.poll() is None:
        if (folder / "control").exists():
            return daemon
        time.sleep(0.05)
    daemon.kill()
    daemon.wait()
    return None


def _end(control: str, daemon: subprocess.Popen[bytes]) -> None:
    """Ask the service that the environment names to end, and see to it that it does."""
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run([control], input=b"quit\n", timeout=PATIENCE, check=False, capture_output=True)
    with suppress(subprocess.TimeoutExpired):
        daemon.wait(PATIENCE)
    if daemon.poll() is None:
        daemon.kill()
        daemon.wait()
