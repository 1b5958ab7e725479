"""What a person waits for: --help, the first step of the demo, and all 20 steps of configs/tiny.py, in seconds."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MOEJAX = [sys.executable, "-m", "moejax.cli"]


def until_line(command: list[str], metrics: Path, saved: bool = False) -> float:
    """Seconds from the start of the process to its first line in metrics.jsonl; then it is killed.

    Args:
        saved: let it write a checkpoint first.
    """
    before = lines(metrics)
    begin = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while (now := lines(metrics)) <= before or not now:
        before = min(before, now)  # a resumed run cuts back what was not saved
        if process.poll() is not None:
            raise RuntimeError("the run ended before its first step")
        time.sleep(0.05)
    seconds = time.perf_counter() - begin
    while saved and not any(path.name.isdigit() for path in metrics.parent.glob("checkpoints/*")):
        time.sleep(0.05)
    process.kill()
    process.wait()
    return seconds


def lines(metrics: Path) -> int:
    return metrics.read_text().count("\n") if metrics.exists() else 0


def until_first_step(folder: Path) -> float:
    return until_line([*MOEJAX, "train", "configs/demo.py", f"run_dir={folder}/demo", f"data.cache={folder}/cache"],
                      folder / "demo" / "metrics.jsonl")


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
