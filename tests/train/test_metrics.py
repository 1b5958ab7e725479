"""The metrics log: strict JSON, every step exactly once over any number of resumes, and its mirror."""

import json
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from moejax.config import ConfigError
from moejax.train.metrics import MetricsLog, read_metrics


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


def test_what_is_not_finite_is_null_and_arrays_are_lists(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with MetricsLog(tmp_path) as log:
        log.write({"step": np.int64(1), "loss": float("nan"), "grad_norm": np.float32("inf"), "lr": np.float32(0.25),
                   "drop_fraction": np.array([0.5, np.nan]), "expert_load": [[0.25, float("-inf")]]})
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
