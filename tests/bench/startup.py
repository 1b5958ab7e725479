"""What a person waits for: --help, the first step of the demo, and all 20 steps of configs/tiny.py, in seconds."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MOEJAX = [sys.executable, "-m", "moejax.cli"]


def until_first_step(folder: Path) -> float:
    """From the start of the process to the demo's first line in metrics.jsonl."""
    begin = time.perf_counter()
    process = subprocess.Popen([*MOEJAX, "train", "configs/demo.py", f"run_dir={folder}/demo",
                                f"data.cache={folder}/cache"], stderr=subprocess.DEVNULL)
    metrics = folder / "demo" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n")):
        if process.poll() is not None:
            raise RuntimeError("the demo ended before its first step")
        time.sleep(0.05)
    seconds = time.perf_counter() - begin
    process.kill()
    process.wait()
    return seconds


def whole(*args: str) -> float:
    begin = time.perf_counter()
    subprocess.run([*MOEJAX, *args], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(json.dumps({"startup_seconds": {
            "moejax --help (under 1)": round(min(whole("--help") for _ in range(3)), 2),
            "first step of the demo done (under 25)": round(until_first_step(folder), 1),
            "20 steps of tiny (under 20)": round(
                whole("train", "configs/tiny.py", f"run_dir={folder}/tiny", f"data.cache={folder}/cache"), 1),
        }}, indent=1))


if __name__ == "__main__":
    main()
