"""Sources to documents, with real files: what is found, in which order, and what every mistake is told."""

import gzip
import json
import os
import socket
import sys
import sysconfig
from pathlib import Path

import pytest
import zstandard

from moejax.config import ConfigError
from moejax.data import sources
from moejax.data.sources import documents, find_files


def fill(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(*named) -> list[tuple[str, str]]:
    files, problems = find_files([str(source) for source in named])
    return [(document.name, document.text) for document in documents(files, problems)]


def problems_of(*named) -> list[str]:
    with pytest.raises(ConfigError) as error:
        read(*named)
    return error.value.problems


def test_a_folder_gives_its_files_in_the_order_of_their_names(tmp_path, monkeypatch):
    fill(tmp_path, {"b.txt": "B", "a/z.py": "Z", "a/y/x.md": "X\r\n", "c": "C", "void.txt": "",
                    ".hidden": "no", ".git/config": "no"})
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind("socket")  # neither a file nor a folder
    assert read(tmp_path) == [("a/y/x.md", "X\r\n"), ("a/z.py", "Z"), ("b.txt", "B"), ("c", "C")]


def test_globs_files_and_home(tmp_path, monkeypatch):
    fill(tmp_path, {"a/1.txt": "1", "a/b/2.txt": "2", "a/b/3.py": "3", "[x].txt": "literal"})
    assert read(tmp_path / "a" / "*.txt") == [("1.txt", "1")]
    assert read(tmp_path / "*" / "*.txt") == [("a/1.txt", "1")]
    assert read(tmp_path / "a" / "**" / "*.txt") == [("1.txt", "1"), ("b/2.txt", "2")]
    assert read(tmp_path / "a" / "**") == [("1.txt", "1"), ("b/2.txt", "2"), ("b/3.py", "3")]
    assert read(tmp_path / "[x].txt") == [("[x].txt", "literal")]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/a/1.txt") == [("1.txt", "1")]
    monkeypatch.chdir(tmp_path)
    assert read("a/b/*") == [("2.txt", "2"), ("3.py", "3")]


def test_a_file_named_twice_counts_once_and_sources_have_no_order(tmp_path):
    fill(tmp_path, {"a.txt": "A", "b.txt": "B"})
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", tmp_path / "*.txt", tmp_path) == [("a.txt", "A"), ("b.txt", "B")]
    assert read(tmp_path / "b.txt", tmp_path / "a.txt") == read(tmp_path / "a.txt", tmp_path / "b.txt")


def test_json_lines_plain_and_compressed(tmp_path):
    rows = [{"text": "one\ntwo", "id": 1}, {"text": ""}, {"text": "é"}]
    plain = "\n\n".join(json.dumps(row) for row in rows).encode()  # blank lines are skipped, no newline at the end
    half = len(plain) // 2
    frames = zstandard.compress(plain[:half]) + zstandard.compress(plain[half:])  # as parallel writers leave it
    fill(tmp_path, {"p.jsonl": plain, "g.jsonl.gz": gzip.compress(plain), "z.jsonl.zst": frames})
    expected = ["one\ntwo", "é"]
    for name in ("p.jsonl", "g.jsonl.gz", "z.jsonl.zst"):
        assert read(tmp_path / name) == [(name, text) for text in expected]
    assert [text for _, text in read(tmp_path)] == expected * 3


def test_a_zstd_line_may_cross_frames_and_chunks(tmp_path):
    texts = ["x" * 3_000_000, "y"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    parts = [lines[first : first + 999_983] for first in range(0, len(lines), 999_983)]
    fill(tmp_path, {"z.jsonl.zst": b"".join(zstandard.compress(part) for part in parts)})
    assert [text for _, text in read(tmp_path)] == texts


def test_the_standard_library_has_no_tests_and_reads_without_problems():
    files, problems = find_files(["stdlib"])
    names = {file.name for file in files}
    assert problems == [] and {"json/decoder.py", "argparse.py"} <= names and len(names) == len(files) > 300
    banned = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not [name for name in names if banned & set(name.split("/"))]
    assert all(name.endswith(".py") for name in names) and files == sorted(files)


def test_of_the_standard_library_only_its_source_is_read(tmp_path, monkeypatch):
    fill(tmp_path, {"ok.py": "ok", "data.bin": b"\xff", "test/t.py": "t", "a/tests/t.py": "t",
                    "site-packages/s.py": "s"})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path) if name == "stdlib" else None)
    assert read("stdlib") == [("ok.py", "ok")]


DEFLATED = gzip.compress(b'{"text": "x"}\n' * 9)
BAD_FILES = {  # file: (content, what is said after the rule)
    "latin.txt": (b"caf\xe9!", "latin.txt has byte 0xe9 at byte offset 3; convert it"),
    "a.jsonl": ('{"text": "ok"}\n{"text": oops}\n', "a.jsonl:2 is none: Expecting value: line 1 column 10 (char 9); "),
    "b.jsonl": ('\n{"content": "x", "id": 3}\n', 'b.jsonl:2 is none: it is {"content": "x", "id": 3}; repair'),
    "c.jsonl": ('{"text": 7}\n', 'c.jsonl:1 is none: it is {"text": 7}; repair'),
    "d.jsonl": ('["text"]\n', 'd.jsonl:1 is none: it is ["text"]; repair'),
    "e.jsonl": (b'{"text": "\xff"}\n', "e.jsonl:1 is none: 'utf-8' codec can't decode byte 0xff in position 10"),
    "f.jsonl": ("[" * 200_000, "f.jsonl:1 is none: maximum recursion depth exceeded"),
    "g.jsonl.gz": (b"text", "g.jsonl.gz is not (Not a gzipped file (b'te')); repair"),
    "h.jsonl.gz": (DEFLATED[:-9], "h.jsonl.gz is not (Compressed file ended before"),
    "k.jsonl.gz": (DEFLATED[:10] + b"\xff" * 20, "k.jsonl.gz is not (Error -3 while decompressing"),
    "i.jsonl.zst": (b"text", "i.jsonl.zst is not (zstd decompressor error: Unknown frame descriptor); repair"),
    "j.jsonl.zst": (zstandard.compress(b'{"text": "x"}\n' * 9)[:-1], "is not (the file ends in the middle of a frame)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_the_rule_and_the_repair(tmp_path, name):
    content, said = BAD_FILES[name]
    fill(tmp_path, {name: content})
    (problem,) = problems_of(tmp_path / name)
    assert str(tmp_path / name) in problem and said in problem
    assert problem.startswith(("every text file must be UTF-8; ", "every file of data.sources must be readable; ",
                               'every line of a .jsonl must be a JSON object with a "text" string or "parts"; '))


def test_a_source_without_text(tmp_path, monkeypatch):
    fill(tmp_path, {"void.txt": "", "voids/1": "", "voids/2": "", "folder/.hidden": "x"})
    monkeypatch.chdir(tmp_path)
    for source, said in {"void.txt": "is of empty files", "voids": "is of empty files",
                         "folder": "matches no file"}.items():
        (problem,) = problems_of(source)
        assert f"; {source!r} {said} (hidden ones do not count); correct it" in problem
    assert problems_of() == ["data.sources must name at least one source; got none; set data.sources=stdlib"]


@pytest.mark.parametrize("source", ["missing.txt", "*.nothing", "", "a/b/c.jsonl"])
def test_a_source_that_matches_nothing(tmp_path, monkeypatch, source):
    fill(tmp_path, {"some.txt": "text"})
    monkeypatch.chdir(tmp_path)
    (problem,) = problems_of(source)
    assert problem == ("a source must be a file, a folder, a glob or the word stdlib, and hold text; "
                       f"{source!r} matches no file (hidden ones do not count); correct it (relative paths start at "
                       f"{tmp_path})")


def test_unreadable_files_and_folders(tmp_path, monkeypatch):
    fill(tmp_path, {"a.txt": "A", "closed/b.txt": "B"})
    (tmp_path / "broken.txt").symlink_to(tmp_path / "gone")
    scandir = os.scandir

    def deny(path):  # chmod does not stop the superuser, who may run this test
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    assert len(problems_of(tmp_path / "closed")) == 1  # and not that it is empty as well
    link, folder = sorted(problems_of(tmp_path))
    assert f"{tmp_path}/broken.txt is not ([Errno 2] No such file" in link
    assert f"{tmp_path}/closed is not ([Errno 13] Permission denied" in folder


def test_all_problems_come_at_once(tmp_path):
    fill(tmp_path, {name: content for name, (content, _) in BAD_FILES.items()})
    problems = problems_of(tmp_path / "missing", tmp_path, tmp_path / "*.nothing")
    assert len(problems) == len(BAD_FILES) + 2
    for _, said in BAD_FILES.values():
        assert sum(said in problem for problem in problems) == 1


def test_every_bad_line_is_named_up_to_a_limit(tmp_path):
    fill(tmp_path, {"a.jsonl": "{}\n" * (sources.SHOWN + 7)})
    problems = problems_of(tmp_path)
    assert [f"a.jsonl:{n} " in problem for n, problem in enumerate(problems[:-1], 1)] == [True] * sources.SHOWN
    assert problems[-1] == "and 7 more problems like these"


def test_after_a_problem_nothing_more_is_yielded(tmp_path):
    fill(tmp_path, {"a.txt": "A", "b.txt": b"\xff", "c.txt": "C"})
    stream = documents(find_files([str(tmp_path)])[0])
    assert next(stream) == ("a.txt", ("A",))
    with pytest.raises(ConfigError, match=r"b\.txt has byte 0xff at byte offset 0"):
        next(stream)


def test_zstandard_is_asked_for_only_where_it_is_needed(tmp_path, monkeypatch):
    fill(tmp_path, {"a.jsonl": '{"text": "A"}', "b.jsonl.zst": zstandard.compress(b'{"text": "B"}')})
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert read(tmp_path / "a.jsonl") == [("a.jsonl", "A")]
    (problem,) = problems_of(tmp_path)
    assert "b.jsonl.zst is not (it needs the optional package zstandard; pip install 'moejax[zst]')" in problem
