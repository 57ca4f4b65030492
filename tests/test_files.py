import pytest

from nervenet import files


def test_a_folder_that_takes_no_files_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, 'access', lambda path, mode: False)
    with pytest.raises(PermissionError, match='run: nothing can be written there; choose another --out'):
        files.make_folder(tmp_path / 'run', '--out')
