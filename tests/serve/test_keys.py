"""API keys: only hashes are stored, several are valid, and a revoked one is refused at once."""

from pathlib import Path

import pytest

from cluster.errors import DataError
from serve.keys import KeyFile


def test_keys_have_names_and_only_their_hashes_are_stored(tmp_path: Path) -> None:
    keys = KeyFile(str(tmp_path))
    anna, ben = keys.add("anna"), keys.add("ben")
    assert anna != ben
    assert (keys.owner(anna), keys.owner(ben)) == ("anna", "ben")
    assert keys.owner(anna[:-1]) is None
    assert keys.owner("") is None
    stored = (tmp_path / "keys.json").read_text()
    assert anna not in stored
    assert (tmp_path / "keys.json").stat().st_mode & 0o077 == 0


def test_a_key_without_a_name_is_not_made(tmp_path: Path) -> None:
    for name in (" ", "dir=elsewhere"):
        with pytest.raises(DataError, match="needs a name"):
            KeyFile(str(tmp_path)).add(name)


def test_another_process_takes_note_of_new_and_revoked_keys(tmp_path: Path) -> None:
    server, person = KeyFile(str(tmp_path)), KeyFile(str(tmp_path))
    assert server.owner("rl-none") is None
    key = person.add("anna")
    assert server.owner(key) == "anna"
    person.revoke("anna")
    assert server.owner(key) is None
    assert person.names() == {}


def test_a_name_is_used_once_and_an_unknown_one_is_not_revoked(tmp_path: Path) -> None:
    keys = KeyFile(str(tmp_path))
    keys.add("anna")
    with pytest.raises(DataError, match="a key named anna already"):
        keys.add("anna")
    with pytest.raises(DataError, match="no key named ben; there are anna"):
        keys.revoke("ben")
