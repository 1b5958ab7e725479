"""From `config.data.sources` to documents: which files they name, and the text and the images in them.

Neither stops at the first mistake: `find_files` returns the problems, `documents` raises them with those of the text.
"""

import glob
import gzip
import json
import os
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moejax.config import ConfigError
from moejax.data.images import PICTURES, VIDEOS, Ref

NOT_LIBRARY = frozenset(("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"))
SHOWN = 50  # problems in one error; a million bad lines would bury the first
Parts = tuple[str | Ref, ...]  # of a document: text, and images where they stand in it


class File(NamedTuple):
    """A file to read.  `name` is its path below its source, so that a moved folder keeps its names."""

    name: str
    path: Path
    size: int  # bytes
    mtime_ns: int


class Document(NamedTuple):
    name: str  # of its file
    parts: Parts

    @property
    def text(self) -> str:
        """All text, with an image's name in its place."""
        return "".join(part if isinstance(part, str) else f"\0{part.name}\0" for part in self.parts)


def find_files(sources: Sequence[str]) -> tuple[list[File], list[str]]:
    """Every file that the sources name, once each and sorted by name, and the problems met.

    Sources are files, folders (all below, but hidden files and links to folders), globs (`**` goes into folders), or
    "stdlib": Python's standard library without its tests.  Images are passed over: .jsonl and .tar files name them.
    """
    found: dict[str, File] = {}
    problems = [] if sources else ["data.sources must name at least one source; got none; set data.sources=stdlib"]
    for source in sources:
        before, size = len(problems), 0
        root, paths = expand(source, problems)
        for path in paths:
            try:
                stat = path.stat()
            except OSError as error:
                problems.append(unreadable(path, error))
                continue
            name, size = path.relative_to(root).as_posix(), size + stat.st_size
            found.setdefault(os.path.realpath(path), File(name, path, stat.st_size, stat.st_mtime_ns))
        if len(problems) == before and not size:
            problems.append("a source must be a file, a folder, a glob or the word stdlib, and hold text; "
                            f"{source!r} {'is of empty files' if paths else 'matches no file'} (hidden ones do not "
                            f"count); correct it (relative paths start at {os.getcwd()})")
    return sorted(found.values()), problems


def expand(source: str, problems: list[str]) -> tuple[Path, list[Path]]:
    """The folder that a source's names start from, and the source's files."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return root, [path for path in walk(root, problems, NOT_LIBRARY) if path.suffix == ".py"]
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):
        return path.parent, [path]
    if source and os.path.isdir(path):
        return path, [found for found in walk(path, problems) if not is_image(found.name)]
    root = next((parent for parent in path.parents if not set("*?[") & set(str(parent))), path)
    return root, [Path(match) for match in glob.glob(str(path), recursive=True)
                  if os.path.isfile(match) and not is_image(match)]


def is_image(name: str) -> bool:
    return name.lower().endswith(PICTURES + VIDEOS)


def walk(root: Path, problems: list[str], skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The files below a folder, neither hidden, nor in a folder of a `skipped` name, nor pipes and the like."""
    for folder, folders, names in os.walk(
            root, onerror=lambda error: problems.append(unreadable(error.filename, error))):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        for name in names:
            path = Path(folder, name)
            # a broken link is neither file nor pipe; it goes on, and is reported as unreadable
            if not name.startswith(".") and (path.is_file() or not path.exists()):
                yield path


def unreadable(path: Any, error: Exception) -> str:
    return (f"every file of data.sources must be readable; {path} is not ({error}); "
            "repair the file, or leave it out by naming the others with a glob")


def documents(files: Sequence[File], problems: Sequence[str] = ()) -> Iterator[Document]:
    """Every document that is not empty, in the order of the files.

    A line of a .jsonl, or a group of a .tar, is a document under its file's name, which stays when a line is inserted
    above it.  Raises ConfigError after the last file, with `problems` and all that is wrong in the files; from the
    first problem on, nothing is yielded.
    """
    problems = list(problems)
    for file in files:
        read = next((read for ending, read in READERS.items() if file.path.name.endswith(ending)), whole_file)
        try:
            for parts in read(file, problems):
                if any(parts) and not problems:
                    yield Document(file.name, parts)
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            problems.append(unreadable(file.path, error))
    if problems:
        more = [f"and {len(problems) - SHOWN} more problems like these"] if len(problems) > SHOWN else []
        raise ConfigError(problems[:SHOWN] + more)


def whole_file(file: File, problems: list[str]) -> Iterator[Parts]:
    """The text of a file as one document, byte for byte (line ends are not translated)."""
    try:
        yield (file.path.read_bytes().decode(),)
    except UnicodeDecodeError as error:
        problems.append(f"every text file must be UTF-8; {file.path} has byte 0x{error.object[error.start]:02x} at "
                        f"byte offset {error.start}; convert it (iconv -t utf-8), or name the text files by a glob")


def json_lines(open_lines: Callable[[Path], Any], file: File, problems: list[str]) -> Iterator[Parts]:
    """The "text" or the "parts" of every line of a .jsonl, .jsonl.gz or .jsonl.zst; blank lines are skipped."""
    folder = os.path.abspath(file.path.parent)

    def refer(name: str, video: bool) -> Ref:
        return Ref(name, os.path.join(folder, name), 0, -1, video)

    with closing(open_lines(file.path)) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield row_parts(json.loads(line.decode()), refer)
                except (ValueError, RecursionError) as error:  # a deep enough [[[… recurses too deep
                    problems.append('every line of a .jsonl must be a JSON object with a "text" string or "parts"; '
                                    f"{file.path}:{number} is none: {error}; repair or delete the line")


def row_parts(row: Any, refer: Callable[[str, bool], Ref]) -> Parts:
    """The "text" of a row, or its "parts" with `refer(name, is a video)`.  Raises ValueError that says what it is."""
    match row:
        case {"text": str(text)}:
            return (text,)
        case {"parts": [*parts]}:
            return tuple(row_part(part, refer) for part in parts)
    raise ValueError(f"it is {json.dumps(row)[:80]}")


def row_part(part: Any, refer: Callable[[str, bool], Ref]) -> str | Ref:
    match part:
        case {"text": str(text)}:
            return text
        case {"image": str(name)} | {"video": str(name)} if name:
            return refer(name, "video" in part)
    raise ValueError(f'a part has a "text", "image" or "video" string, not {json.dumps(part)[:80]}')


def tar_groups(file: File, problems: list[str]) -> Iterator[Parts]:
    """The documents of a .tar as WebDataset writes it: a group of files alike up to the first dot is one."""
    with tarfile.open(file.path, "r:") as tar:
        files = {os.path.normpath(one.name): one for one in tar if one.isfile()}
        groups: dict[str, list[str]] = {}
        for name in files:
            folder, base = os.path.split(name)
            if not base.startswith("."):
                groups.setdefault(os.path.join(folder, base.split(".")[0]), []).append(name)
        for key, names in groups.items():
            try:
                yield group_parts(tar, os.path.abspath(file.path), files, names)
            except (ValueError, RecursionError) as error:
                problems.append("the .json and .txt of a .tar must be UTF-8 and name files of that .tar; "
                                f"{file.path}:{key}: {error}; repair it, or take it out of the .tar")


def group_parts(tar: tarfile.TarFile, path: str, files: dict[str, tarfile.TarInfo], names: list[str]) -> Parts:
    """What the .json of a group says, else its images and then its .txt.  Raises ValueError."""
    def read(ending: str) -> list[str]:
        return [tar.extractfile(files[name]).read().decode() for name in names if name.endswith(ending)]

    def refer(name: str, video: bool) -> Ref:
        found = files.get(os.path.normpath(name))
        if found is None:
            raise ValueError(f"there is no {name!r} in it")
        return Ref(name, path, found.offset_data, found.size, video)

    for row in map(json.loads, read(".json")):
        if isinstance(row, dict) and row.keys() & {"text", "parts"}:
            return row_parts(row, refer)
    images = [refer(name, name.lower().endswith(VIDEOS)) for name in names if is_image(name)]
    return (*images, *read(".txt"))


def zstd_lines(path: Path) -> Iterator[bytes]:
    """Frame by frame, as zstandard's own reader ends silently where a file is cut short.  Raises OSError there."""
    try:
        import zstandard  # an optional extra
    except ImportError:
        raise OSError("it needs the optional package zstandard; pip install 'moejax[zst]'") from None
    frame, rest = zstandard.ZstdDecompressor().decompressobj(), b""
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            while chunk:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                try:
                    *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from None
                yield from lines
                chunk = frame.unused_data
    yield rest
    if not frame.eof:
        raise OSError("the file ends in the middle of a frame")


READERS: dict[str, Callable[[File, list[str]], Iterator[Parts]]] = {
    ".jsonl": partial(json_lines, partial(open, mode="rb")), ".jsonl.gz": partial(json_lines, gzip.open),
    ".jsonl.zst": partial(json_lines, zstd_lines), ".tar": tar_groups}
