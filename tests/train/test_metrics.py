"""The metrics log: strict JSON, every step exactly once over any number of resumes, and its mirror."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from moejax.config import ConfigError
from moejax.train.metrics import FILE, MetricsLog, cut_back, read_events, read_lines, read_metrics


def record(step, loss=2.0):
    return {"step": step, "loss": loss}


def steps(run_dir):
    return [each["step"] for each in read_metrics(run_dir)]


def events(run_dir):
    """Every TensorBoard event of a run, in the order of its files.  A TFRecord is length, crc, data, crc."""
    found = []
    for file in sorted((run_dir / "tensorboard").iterdir(), key=lambda path: path.suffix):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12:12 + size]))
            data = data[size + 16:]
    return found


def test_each_record_is_a_line_on_disk_at_once(tmp_path):
    with MetricsLog(tmp_path / "new" / "run") as log:
        log.write(record(1))
        assert (tmp_path / "new" / "run" / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'
        log.write(record(2, 1.5))
        assert read_metrics(tmp_path / "new" / "run") == [record(1), record(2, 1.5)]


def test_what_is_not_finite_is_null(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.25,
                   "drop_fraction": [0.5, float("nan")], "expert_load": [[0.25, float("-inf")]]})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1, "loss": None, "grad_norm": None, "lr": 0.25, "drop_fraction": [0.5, None],
        "expert_load": [[0.25, None]]}


def test_resume_drops_later_steps_and_the_torn_line(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write(record(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    with MetricsLog(tmp_path, from_step=3) as log:
        assert steps(tmp_path) == [1, 2, 3]
        log.write(record(4, 9.0))
    assert read_metrics(tmp_path) == [record(1), record(2), record(3), record(4, 9.0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_resume_after_a_line_that_lacks_only_its_end(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    with MetricsLog(tmp_path, from_step=2) as log:
        log.write({"step": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def back(step, to):
    return {"event": "rewind", "step": step, "to": to, "offset": step - to}


# A run that goes back from step 5 to its checkpoint of step 2, and from step 7 to that of step 6.
BACK = [record(1), record(2), record(3), record(4), record(5), back(5, 2), record(3, 1.0), record(4, 1.0),
        record(5, 1.0), record(6, 1.0), record(7, 1.0), back(7, 6), record(7, 0.5)]


def written(run_dir, lines):
    with MetricsLog(run_dir) as log:
        for line in lines:
            log.write(line)


def test_of_steps_done_again_the_last_record_counts(tmp_path):
    written(tmp_path, BACK)
    assert read_metrics(tmp_path) == [record(1), record(2), *(record(step, 1.0) for step in (3, 4, 5, 6)),
                                      record(7, 0.5)]
    assert read_events(tmp_path) == [back(5, 2), back(7, 6)]
    assert read_lines(tmp_path / FILE) == BACK


@pytest.mark.parametrize("length, expected", [
    (6, [(1, 2.0), (2, 2.0)]), (7, [(1, 2.0), (2, 2.0), (3, 1.0)]),
    (12, [(1, 2.0), (2, 2.0), (3, 1.0), (4, 1.0), (5, 1.0), (6, 1.0)])])
def test_what_was_not_done_again_yet_does_not_count(tmp_path, length, expected):
    """As a report sees a run that has just gone back."""
    written(tmp_path, BACK[:length])
    assert [(each["step"], each["loss"]) for each in read_metrics(tmp_path)] == expected


# The newest checkpoint when the run was killed: none, 2, after going back 4, 5 and 6, after that again 7.
@pytest.mark.parametrize("killed, saved, left", [
    (13, 0, 0), (13, 2, 2), (5, 2, 2), (6, 2, 2), (7, 2, 2), (8, 4, 8), (9, 4, 8), (9, 5, 9), (13, 5, 9), (10, 6, 10),
    (11, 6, 10), (12, 6, 10), (13, 6, 10), (13, 7, 13)])
def test_a_resume_leaves_what_the_run_had_written_when_it_saved(tmp_path, killed, saved, left):
    """And so a run that is killed and resumed ends with the file of one that is not."""
    written(tmp_path, BACK[:killed])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 9, "lo')
    with MetricsLog(tmp_path, saved) as log:
        assert read_lines(tmp_path / FILE) == BACK[:left]
        for line in BACK[left:]:
            log.write(line)
    assert read_lines(tmp_path / FILE) == BACK


def test_cutting_back_keeps_every_byte_before(tmp_path):
    text = '{"step": 1,   "loss": 0.10}\n\n{"step": 2, "note": "größe"}\n{"st\n{"step": 3}\n'
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    cut_back(tmp_path / FILE, 2)
    assert (tmp_path / FILE).read_text("utf-8") == '{"step": 1,   "loss": 0.10}\n{"step": 2, "note": "größe"}\n'


def test_a_record_that_cannot_be_written_is_written_with_a_later_one(tmp_path):
    with MetricsLog(tmp_path) as log:
        assert log.write(record(1)) is None
        (tmp_path / FILE).rename(tmp_path / "away")
        (tmp_path / FILE).mkdir()
        for step in (2, 3):
            assert "Is a directory" in log.write(record(step))
        (tmp_path / FILE).rmdir()
        (tmp_path / "away").rename(tmp_path / FILE)
        assert steps(tmp_path) == [1]
        assert log.write(record(4)) is None and steps(tmp_path) == [1, 2, 3, 4]
        assert log.write(record(5)) is None
    assert (tmp_path / FILE).read_text() == "".join(f'{{"step": {step}, "loss": 2.0}}\n' for step in range(1, 6))


class Disk:
    """A file on a disk with room for so many bytes, which takes 3 at a time."""

    def __init__(self, path, room):
        self.path, self.room = path, room

    def __enter__(self):
        self.file = self.path.open("ab", buffering=0)
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        part = data[:min(3, self.room)]
        if not part:
            raise OSError(28, "No space left on device")
        self.room -= len(part)
        return self.file.write(part)


def test_a_record_may_be_written_in_pieces(tmp_path, monkeypatch):
    """A disk that is almost full takes a part of a line; the rest follows when there is room."""
    disk, right = Disk(tmp_path / "real", 40), Path.open
    monkeypatch.setattr(Path, "open", lambda path, *mode, **more: (
        disk if (path, mode) == (tmp_path / FILE, ("ab",)) else right(path, *mode, **more)))
    with MetricsLog(tmp_path) as log:
        assert log.write(record(1)) is None
        assert "No space left" in log.write(record(2)) and "No space left" in log.write(record(3))
        assert disk.path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "lo'
        disk.room = 1000
        assert log.write(record(4)) is None
    assert disk.path.read_text() == "".join(f'{{"step": {step}, "loss": 2.0}}\n' for step in range(1, 5))


def test_the_other_processes_of_a_group_write_nothing(tmp_path):
    with MetricsLog(tmp_path / "run", 3, write=False) as log:
        assert log.write(record(4)) is None
    assert list(tmp_path.iterdir()) == []


FULL = """
import sys
from pathlib import Path
from moejax.train.metrics import MetricsLog
disk = Path(sys.argv[1])
def write(first, last):
    return [log.write({"step": step, "expert_load": [[1.0]] * 20}) for step in range(first, last)]
log = MetricsLog(disk / "run")
assert not any(write(1, 4))
with (disk / "rest").open("wb", buffering=0) as rest:
    try:
        while rest.write(bytes(4096)):
            pass
    except OSError:
        pass
assert write(4, 60)[-1]  # the last page of a file takes some of them
(disk / "rest").unlink()
assert not any(write(60, 100))
log.close()
print("went on")
"""


def test_a_full_disk_does_not_stop_a_run(tmp_path):
    """TensorBoard's files lie there too."""
    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=30)
        assert done.stdout == "went on\n", done.stderr
        assert steps(tmp_path / "run") == list(range(1, 100))
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_run_from_the_start_keeps_nothing_of_an_earlier_one(tmp_path):
    for loss in (2.0, 3.0):
        with MetricsLog(tmp_path) as log:
            log.write(record(1, loss))
    assert read_metrics(tmp_path) == [record(1, 3.0)]


def test_a_torn_line_may_end_in_half_a_character_or_in_zeros(tmp_path):
    for tail in (b'{"note": "\xe2\x82', b"\0\0\0\0"):
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + tail)
        assert steps(tmp_path) == [1]


def test_damage_before_the_last_line_is_not_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ConfigError, match="line 2 is not; delete it"):
        read_metrics(tmp_path)


def test_no_log_reads_as_no_records(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_holds_the_numbers_by_layer(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 7, "loss": 2.5, "z_loss": float("nan"), "drop_fraction": [0.125, 0.0],
                   "expert_load": [[0.25, 0.75], [0.5, 0.5]]})
    found = {value.tag: (event.step, value.simple_value)
             for event in events(tmp_path) for value in event.summary.value}
    assert found == {  # the busiest expert has 0.75 of the tokens where an even share of two is 0.5
        "loss": (7, 2.5), "drop_fraction/layer_0": (7, 0.125), "drop_fraction/layer_1": (7, 0.0),
        "expert_load_max/layer_0": (7, 1.5), "expert_load_max/layer_1": (7, 1.0)}


def test_tensorboard_is_told_to_forget_the_steps_after_a_resume(tmp_path):
    for from_step in (0, 2):  # within a second: the second file must not overwrite the first
        with MetricsLog(tmp_path, from_step) as log:
            for step in range(from_step + 1, from_step + 4):
                log.write(record(step))
    story = [("start", event.step) if event.HasField("session_log") else event.step
             for event in events(tmp_path) if event.HasField("session_log") or event.summary.value]
    assert story == [("start", 1), 1, 2, 3, ("start", 3), 3, 4, 5]


def test_going_back_is_no_number_for_tensorboard(tmp_path):
    written(tmp_path, [{"step": 1, "bad": 0, "skipped": 2}, back(1, 0)])
    found = [(value.tag, event.step, value.simple_value)
             for event in events(tmp_path) for value in event.summary.value]
    assert found == [("bad", 1, 0), ("skipped", 1, 2)]
