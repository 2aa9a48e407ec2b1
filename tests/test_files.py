import pytest

from tdlrt.files import write_atomically


def test_failing_in_the_middle_of_a_file_keeps_the_old_one(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise MemoryError

    with pytest.raises(MemoryError):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
