import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tdlrt.files import (
    ABANDONED,
    PART,
    open_regular,
    path_of,
    read_text,
    remove_parts,
    write_atomically,
)


def write(path, content):
    write_atomically(path, lambda file: file.write(content))


# --- writing --------------------------------------------------------------------------------------


def test_failing_in_the_middle_of_a_file_keeps_the_old_one(tmp_path):
    path = tmp_path / "file"
    write(path, b"old")

    def fail(file):
        file.write(b"ne")
        raise MemoryError

    with pytest.raises(MemoryError):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path, monkeypatch
):
    calls = []
    sync, replace = os.fsync, os.replace

    def record_sync(descriptor):
        calls.append(("fsync", os.fstat(descriptor).st_ino))
        sync(descriptor)

    def record_replace(source, target):
        calls.append(("replace", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    path = tmp_path / "file"
    write(path, b"content")
    file, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert calls == [("fsync", file), ("replace", file, 7), ("fsync", folder)]


def test_the_new_file_has_the_mode_that_every_new_file_has(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    write(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_of_several_writers_a_reader_never_sees_a_part(tmp_path):
    path, stop = tmp_path / "file", threading.Event()

    def write_again_and_again(letter):
        while not stop.is_set():
            write(path, letter * 300_000)

    write(path, b"-" * 300_000)
    found, reads, end = set(), 0, time.monotonic() + 60
    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(write_again_and_again, letter) for letter in (b"a", b"b", b"c")]
        try:
            while (reads < 300 or not found >= {b"a", b"b", b"c"}) and time.monotonic() < end:
                content = path.read_bytes()
                reads += 1
                assert content == content[:1] * 300_000
                found.add(content[:1])
        finally:
            stop.set()
        assert [writer.result() for writer in writers] == [None, None, None]
    assert found >= {b"a", b"b", b"c"}
    assert list(tmp_path.iterdir()) == [path]


def left(folder, name, age):
    part = folder / f"{name}.{'0' * 16}{PART}"
    part.write_bytes(b"half")
    os.utime(part, (time.time() - age,) * 2)
    return part


def test_parts_of_killed_writers_do_not_pile_up(tmp_path):
    old = left(tmp_path, "file", 2 * ABANDONED)
    kept = [
        left(tmp_path, "other", 2 * ABANDONED),
        left(tmp_path, "file.txt", 2 * ABANDONED),
        tmp_path / "file.part",
        tmp_path / "file.of-mine.part",
    ]
    for mine in kept[2:]:
        mine.write_bytes(b"mine")
        os.utime(mine, (0, 0))
    write(tmp_path / "file", b"new")
    assert not old.exists()
    assert all(path.exists() for path in kept)


def test_a_part_that_may_be_that_of_a_living_writer_stays(tmp_path):
    part = left(tmp_path, "file", ABANDONED / 2)
    write(tmp_path / "file", b"new")
    assert part.exists()
    remove_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["file", f"file.{'0' * 16}{PART}"])
def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path, name):
    outside, path = tmp_path / "outside", tmp_path / "inside" / "file"
    outside.write_bytes(b"mine")
    path.parent.mkdir()
    path.with_name(name).symlink_to(outside)
    write(path, b"new")
    assert (path.read_bytes(), outside.read_bytes()) == (b"new", b"mine")
    assert not path.is_symlink()


def fifo(path):
    os.mkfifo(path)


def listening(path):
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.fspath(path))


SPECIAL = {"folder": os.mkdir, "pipe": fifo, "socket": listening}


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_file_is_not_replaced(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = tmp_path / "file"
    make("file")
    before = path.lstat()
    with pytest.raises(OSError, match=r"is a folder|is not a regular file") as caught:
        write(path, b"new")
    assert caught.value.filename == str(path)
    assert path.lstat().st_ino == before.st_ino
    assert list(tmp_path.iterdir()) == [path]


def test_errors_of_the_system_name_the_file(tmp_path):
    path = tmp_path / "file"

    def full(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomically(path, full)
    assert (caught.value.errno, caught.value.filename) == (28, str(path))
    with pytest.raises(OSError, match="null byte"):
        write(tmp_path / "a\0b", b"")
    write(path, b"")
    with pytest.raises(OSError, match="file"):
        write(path / "in a file", b"")
    assert list(tmp_path.iterdir()) == [path]


# --- reading --------------------------------------------------------------------------------------


def test_a_regular_file_is_read_even_where_another_takes_its_name(tmp_path):
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"content")
    other.write_bytes(b"other")
    with open_regular(path) as file:
        other.replace(path)
        assert file.read() == b"content"
        if os.path.exists("/proc/self/fd"):
            assert Path(path_of(file)).read_bytes() == b"content"


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_file_is_not_read_and_not_waited_for(tmp_path, monkeypatch, make, linked):
    monkeypatch.chdir(tmp_path)
    make("there")
    if linked:
        (tmp_path / "link").symlink_to("there")
    with pytest.raises(OSError, match=r"irectory|not a regular file|No such device"):
        open_regular(tmp_path / ("link" if linked else "there"))


@pytest.mark.parametrize("name", ["none", "a\0b", "a" * 300, "\ud800"])
def test_names_that_no_file_has(tmp_path, name):
    with pytest.raises(OSError):
        open_regular(tmp_path / name)


def test_a_text_is_read_up_to_a_limit(tmp_path):
    path = tmp_path / "file"
    path.write_text("äb", encoding="utf-8")
    assert read_text(path, max_bytes=3) == "äb"
    with pytest.raises(ValueError, match="more than 2 bytes"):
        read_text(path, max_bytes=2)
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole: it takes no disk, but would take memory
    with pytest.raises(ValueError, match="more than 4,194,304 bytes"):
        read_text(path)
    path.write_bytes("ä".encode("latin-1"))
    with pytest.raises(ValueError, match="utf-8"):
        read_text(path)
