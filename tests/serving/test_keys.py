"""Keys files: made, read, changed, and never holding a key."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sartor.cli.main import guarded
from sartor.errors import SartorError, UsageError
from sartor.serving.access import Bucket
from sartor.serving.keys import ApiKey, KeyFile, add_key, read_keys, revoke_key


def entry(name: str, **fields: Any) -> Any:
    return lambda sha256: ApiKey(name=name, sha256=sha256, **fields)


def test_a_key_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    token = add_key(path, entry("alice", share=2.5, models=("a", "b:1"), admin=True))
    assert len(token) > 43
    text = path.read_text()
    assert token not in text
    assert token.removeprefix("sk-sartor-") not in text
    assert hashlib.sha256(token.encode()).hexdigest() in text
    (key,) = read_keys(path)
    assert (key.name, key.share, key.models, key.admin) == ("alice", 2.5, ("a", "b:1"), True)
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KeyFile(path).find(token) == key
    assert KeyFile(path).find(token + "x") is None
    assert KeyFile(path).find("\udcff") is None


def test_every_field_survives_writing(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    fields = {
        "share": 0.25,
        "priority": -3,
        "max_streams": 4,
        "requests_per_minute": 5,
        "tokens_per_minute": 6,
        "intake_seconds_per_minute": 1.5,
        "models": ('quo"te', "back\\slash", "\x7f\x01 ä\u20ac"),
        "group": "team",
        "admin": True,
        "metrics": True,
    }
    assert set(fields) | {"name", "sha256"} == set(ApiKey.__struct_fields__)
    add_key(path, entry("a", **fields))
    add_key(path, entry("b"))
    first, second = read_keys(path)
    assert {name: getattr(first, name) for name in fields} == fields
    assert second.share == 1.0


def test_two_who_add_at_once_both_get_their_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    threads = [threading.Thread(target=add_key, args=(path, entry(f"key{i}"))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(path)} == {f"key{i}" for i in range(8)}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["keys.toml", "keys.toml.lock"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[key", "wrong"),
        ("[[key]]\nname = 'a'\n", "sha256"),
        ("[[key]]\nname = 'a'\nsha256 = 'abc'\n", "sha256"),
        (f"[[key]]\nname = 'a b'\nsha256 = '{'0' * 64}'\n", "name"),
        (f"[[key]]\nname = 'a'\nsha256 = '{'0' * 64}'\nshare = 0\n", "share"),
        (f"[[key]]\nname = 'a'\nsha256 = '{'0' * 64}'\nshare = inf\n", "share"),
        (f"[[key]]\nname = 'a'\nsha256 = '{'0' * 64}'\nshares = 2\n", "shares"),
        (f"[[keys]]\nname = 'a'\nsha256 = '{'0' * 64}'\n", "keys"),
        (f"[[key]]\nname = 'a'\nsha256 = '{'0' * 64}'\n" * 2, "two keys"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says) as error:
        KeyFile(path)
    assert str(path) in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SartorError, match=r"absent\.toml"):
        KeyFile(tmp_path / "absent.toml")


def test_changes_count_at_once_and_broken_ones_not_at_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.toml"
    alice = add_key(path, entry("alice"))
    keys = KeyFile(path)
    bob = add_key(path, entry("bob"))
    assert keys.find(bob) is not None
    revoke_key(path, "alice")
    assert keys.find(alice) is None
    good = path.read_text()
    with caplog.at_level(logging.ERROR):
        path.write_text("[[key")
        settle()
        assert keys.find(bob) is not None
        assert keys.find(bob) is not None
    assert len(caplog.records) == 1, "once a change, not once a request"
    path.write_text(good.replace('name = "bob"', 'name = "robert"'))
    found = keys.find(bob)
    assert found is not None
    assert found.name == "robert"
    path.write_text("")
    settle()
    assert keys.find(bob) is None


def settle() -> None:
    """What an editor wrote is believed once it has been left alone."""
    time.sleep(0.3)


def test_half_a_file_gives_nobody_more_rights(tmp_path: Path) -> None:
    """A prefix of a file may be sound TOML: the last key without its limits."""
    path = tmp_path / "keys.toml"
    token = add_key(path, entry("alice", models=("m",), max_streams=2))
    keys = KeyFile(path)
    whole = path.read_bytes()
    cuts = [at for at in range(len(whole)) if whole[at : at + 1] == b"\n"]
    wider = 0
    for at in cuts:
        path.write_bytes(whole[:at])
        with contextlib.suppress(UsageError):
            wider += any(not key.models for key in read_keys(path))
        found = keys.find(token)
        assert found is not None
        assert (found.models, found.max_streams) == (("m",), 2)
        path.write_bytes(whole)
        assert keys.find(token) == found
    assert wider, "a cut that would have given the key more rights"


def test_a_change_of_equal_size_and_time_counts(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    token = add_key(path, entry("alice"))
    keys = KeyFile(path)
    assert keys.find(token) is not None
    before = path.stat()
    text = path.read_text()
    old = hashlib.sha256(token.encode()).hexdigest()
    path.write_text(text.replace(old, "0" * 64))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert keys.find(token) is None


@pytest.mark.skipif(sys.platform == "win32", reason="no such modes")
def test_a_file_that_others_may_write_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.toml"
    token = add_key(path, entry("alice"))
    keys = KeyFile(path)
    assert not caplog.records
    path.chmod(0o666)
    for _ in range(3):
        assert keys.find(token) is not None
    assert [r.getMessage() for r in caplog.records] == [
        f"the keys file {path} may be written by other users (mode 0666), who could let anybody "
        "in; take that right away: chmod 600"
    ]
    caplog.clear()
    KeyFile(path)
    assert len(caplog.records) == 1


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "keys.toml")
    assert guarded(["keys", "add", path, "alice", "--share", "2", "--model", "m"]) == 0
    token = capsys.readouterr().out.strip()
    assert guarded(["keys", "list", path, "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["keys"]
    assert (shown["name"], shown["share"], shown["models"]) == ("alice", 2.0, ["m"])
    assert guarded(["keys", "list", path]) == 0
    plain = capsys.readouterr().out
    assert plain.startswith("alice: share 2, models m")
    digest = hashlib.sha256(token.encode()).hexdigest()
    assert token not in plain
    assert digest not in plain
    assert guarded(["keys", "add", path, "alice"]) == 2
    assert "alice" in capsys.readouterr().err
    assert guarded(["keys", "add", path, "not a name"]) == 2
    assert guarded(["keys", "revoke", path, "bob"]) == 2
    assert "alice" in capsys.readouterr().err
    assert guarded(["keys", "revoke", path, "alice"]) == 0
    assert read_keys(Path(path)) == ()


def test_a_bucket_refills_and_may_owe() -> None:
    bucket = Bucket(60, now=0.0)
    for _ in range(60):
        assert bucket.wait(0.0) == 0
        bucket.take(1)
    assert bucket.wait(0.0) == pytest.approx(1.0)
    assert bucket.wait(1.0) == 0
    bucket.take(121)
    assert bucket.wait(1.0) == pytest.approx(121.0)
    assert bucket.wait(200.0) == 0


def test_salts_of_keys_and_groups_never_meet() -> None:
    keys = [
        ApiKey(name="a", sha256=""),
        ApiKey(name="b", sha256=""),
        ApiKey(name="c", sha256="", group="a"),
        ApiKey(name="d", sha256="", group="a"),
    ]
    salts = [key.salt for key in keys]
    assert salts[2] == salts[3]
    assert len(set(salts)) == 3
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"name": "a\n", "sha256": "0" * 64}, ApiKey)
