import pytest

from nervenet import files


def test_a_folder_that_takes_no_files_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, 'access', lambda path, mode: False)
    with pytest.raises(PermissionError, match='run: nothing can be written there; choose another --out'):
        files.make_folder(tmp_path / 'run', '--out')


@pytest.mark.parametrize('durable', [True, False])
def test_a_file_appears_whole_or_not_at_all_and_on_the_disk_at_once_if_it_is_to_last(tmp_path, monkeypatch, durable):
    synced = []
    monkeypatch.setattr(files.os, 'fsync', lambda descriptor: synced.append(descriptor))
    with files.atomic_write(tmp_path / 'a', durable) as file:
        file.write(b'whole')
        assert not (tmp_path / 'a').exists()
    assert (tmp_path / 'a').read_bytes() == b'whole' and bool(synced) == durable
    with pytest.raises(KeyboardInterrupt), files.atomic_write(tmp_path / 'a', durable) as file:
        file.write(b'half')
        raise KeyboardInterrupt
    assert (tmp_path / 'a').read_bytes() == b'whole' and len(list(tmp_path.iterdir())) == 1
