"""Zip archives that formats read and write, compared with Python's `zipfile`."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from modelcli.checkpoints.format import Candidate
from modelcli.checkpoints.layout import Bytes
from modelcli.checkpoints.zip_archives.directory import storage_of
from modelcli.checkpoints.zip_archives.layout import ZipLayout, place
from modelcli.errors import FileFormatError
from modelcli.writing.output import Output

RECORDS = {"a/plain": b"1" * 100, "a/größe.npy": b"2" * 3, "重み": b"", "a/" + "ü" * 300: b"3"}


def written(records: dict[str, bytes], path: Path) -> Path:
    layout = ZipLayout(place([(name, Bytes(data)) for name, data in records.items()]))
    with path.open("wb+") as file, Output(file, layout.nbytes) as out:
        layout.write(out)
    assert path.stat().st_size == layout.nbytes
    return path


@pytest.mark.parametrize("records", [RECORDS, {}], ids=["names that are not ASCII", "an empty archive"])
def test_zipfile_reads_written_archives(records: dict[str, bytes], tmp_path: Path) -> None:
    path = written(records, tmp_path / "a.zip")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == records
    assert list(Candidate(path).records) == list(records)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_bytes_of_a_record(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        for name, data in RECORDS.items():
            archive.writestr(name, data)
    file = Candidate(tmp_path / "a.zip")
    for name, data in RECORDS.items():
        assert storage_of(file.records[name], file.path, file.identity, "a.zip").bytes() == data


def test_another_compression_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("w", b"1" * 100)
    file = Candidate(tmp_path / "a.zip")
    with pytest.raises(FileFormatError, match=r"a\.zip: record w is compressed with method 12") as error:
        storage_of(file.records["w"], file.path, file.identity, "a.zip")
    assert "torch" not in str(error.value)
