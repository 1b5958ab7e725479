#!/usr/bin/env python3
"""Start N `moejax train` processes on this machine as one group:

    python launch/local.py -n 2 [--restarts 3] [--grace 60] CONFIG [path.to.field=value ...]

Process 0 writes as if it ran alone; what the others write comes on stderr, each line behind the number of its process.
When a process fails, all are started again and go on from the newest checkpoint.  SIGINT, SIGTERM and SIGUSR1 are
passed on to all of them, and after that none is started again.

Exit status: 0 if every process ended with 0, 2 if what was asked for is wrong, else 1.
"""

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PAUSE = 0.05  # seconds between two looks at the processes
LAUNCHER = os.getpid()
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def say(text: str) -> None:
    print(f"local.py: {text}", file=sys.stderr, flush=True)


def die_with_launcher() -> None:
    """In a new process: ask for SIGKILL at the launcher's death.  Linux only; elsewhere a killed launcher leaves the
    processes running.
    """
    if LIBC is not None:
        LIBC.prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != LAUNCHER:  # it died before it was asked
            os._exit(1)


def start(command: Sequence[str], count: int) -> list[subprocess.Popen]:
    """Each in a session of its own, so that a Ctrl-C on the terminal reaches the launcher alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for number in range(count):
        group = {"MOEJAX_COORDINATOR": coordinator, "MOEJAX_PROCESSES": str(count), "MOEJAX_PROCESS": str(number)}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if number else {}
        processes.append(subprocess.Popen(command, env=os.environ | group, stdin=subprocess.DEVNULL, **output,
                                          start_new_session=True, preexec_fn=die_with_launcher))
    return processes


def relay(number: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        sys.stderr.buffer.write(b"[%d] %s\n" % (number, line.removesuffix(b"\n")))
        sys.stderr.buffer.flush()


def ending(status: int) -> str:
    return f"ended with status {status}" if status > 0 else f"was killed by {signal.Signals(-status).name}"


def watch(processes: Sequence[subprocess.Popen], grace: float, caught: list[int]) -> tuple[list[int], bool]:
    """Wait for all processes and pass on the signals caught meanwhile.  Once one has failed or a signal was caught,
    those that still run `grace` seconds later are killed.

    Returns:
        exit statuses, negative where a signal ended the process, and whether a signal was caught
    """
    statuses: dict[int, int] = {}
    deadline, stopped = float("inf"), False
    while len(statuses) < len(processes):
        time.sleep(PAUSE)
        for number, process in enumerate(processes):
            if number in statuses or (status := process.poll()) is None:
                continue
            statuses[number] = status
            if status:
                say(f"process {number} {ending(status)}")
                deadline = min(deadline, time.monotonic() + grace)
            if status == 2:
                for other in processes:
                    other.terminate()
        while caught:
            heard = caught.pop(0)
            for process in processes:
                process.send_signal(heard)
            stopped, deadline = True, min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            for number in sorted(set(range(len(processes))) - set(statuses)):
                say(f"process {number} still ran after {grace:g} s")
                processes[number].kill()
            deadline = float("inf")
    return [statuses[number] for number in range(len(processes))], stopped


def run(command: Sequence[str], count: int, grace: float, caught: list[int]) -> tuple[list[int], bool]:
    """One group from its start to the end of its last process."""
    processes = start(command, count)
    relays = [threading.Thread(target=relay, args=pair, daemon=True) for pair in list(enumerate(processes))[1:]]
    for thread in relays:
        thread.start()
    result = watch(processes, grace, caught)
    for thread in relays:
        thread.join(5)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Start N `moejax train` processes on this machine as one group.")
    parser.add_argument("-n", "--processes", type=int, required=True, metavar="N", help="how many processes")
    parser.add_argument("--restarts", type=int, default=3, metavar="R", help="at most, after a failure (3)")
    parser.add_argument("--grace", type=float, default=60, metavar="S",
                        help="seconds from a failure or a stop to SIGKILL (60)")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="path.to.field=value")
    args = parser.parse_args(argv)
    if args.processes < 1 or args.restarts < 0 or args.grace < 0:
        parser.error("N must be 1 or more, R and S 0 or more")

    caught: list[int] = []
    for each in STOPS:
        signal.signal(each, lambda number, frame: caught.append(number))
    command = [sys.executable, "-m", "moejax.cli", "train", args.config, *args.overrides]
    for restart in range(1, args.restarts + 2):
        statuses, stopped = run(command, args.processes, args.grace, caught)
        if not any(statuses):
            return 0
        if 2 in statuses:
            return 2
        if stopped:
            return 1
        say(f"starting all again ({restart} of {args.restarts})" if restart <= args.restarts else "no restarts left")
    return 1


if __name__ == "__main__":
    sys.exit(main())
