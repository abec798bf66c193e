"""What the commands of the store show and remove: header facts, packed weights, leftovers."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model

from sartor.cli.main import guarded
from sartor.formats.packed import PackedFile, packed_facts, write_packed

Capture = pytest.CaptureFixture[str]
DAY = 24 * 3600


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    code = guarded([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: Capture, *arguments: object) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    value: dict[str, Any] = json.loads(out)
    return value


def put(home: Path, name: str, source: Path, *, link: bool = False) -> Path:
    """A stored model of that (catalogue) name; returns its weights."""
    from sartor.store.manifest import FILES, write_manifest
    from sartor.store.reference import ModelRef
    from sartor.store.source import Fetched, FileRecord

    folder = home / "models" / ModelRef("catalogue", name).key
    (folder / FILES).mkdir(parents=True)
    target = folder / FILES / "m.gguf"
    (os.link if link else shutil.copyfile)(source, target)
    record = FileRecord("m.gguf", target.stat().st_size, "0" * 64, True)
    write_manifest(folder, name, Fetched("pypi:x==1", (record,), None), None)
    return target


def answer(capsys: Capture, model: object, *options: object) -> None:
    assert run(capsys, "run", model, "hi", "--max-tokens", 1, *options)[0] == 0


def packed(home: Path) -> list[Path]:
    return sorted((home / "packed").glob("*.packed"))


def forget_origin(path: Path) -> None:
    """Makes a packed file one of an earlier version, which did not say where it came from."""
    file = PackedFile.open(path)
    arrays = {name: file.array(name) for name in file.names()}
    write_packed(path, {k: v for k, v in file.meta.items() if k != "source"}, arrays)


def test_rm_takes_the_packed_weights_along(capsys: Capture, tiny: Path, home: Path) -> None:
    path = put(home, "smollm2:135m", tiny)
    answer(capsys, "smollm2:135m")
    answer(capsys, "smollm2:135m", "--head-bits", 4)
    other = home.parent / "other.gguf"
    write_tiny_model(other, context=512)
    answer(capsys, other)
    assert len(packed(home)) == 3
    mine = [file for file in packed(home) if packed_facts(file).source == path]
    used = sum(file.stat().st_size for file in mine)
    (listed,) = run_json(capsys, "list")["models"]
    assert listed["packed_bytes"] == used > 0
    _, out, err = run(capsys, "list")
    assert "PACKED" in out
    assert "`sartor clean`" in err
    size = path.stat().st_size
    (removed,) = run_json(capsys, "rm", "smollm2:135m")["removed"]
    assert removed["packed_bytes"] == used
    assert used + size <= removed["freed_bytes"] <= used + size + 1000
    (left,) = packed(home)
    assert packed_facts(left).source == other


def test_rm_finds_packed_weights_of_earlier_versions(
    capsys: Capture, tiny: Path, home: Path
) -> None:
    put(home, "smollm2:135m", tiny)
    answer(capsys, "smollm2:135m")
    answer(capsys, "smollm2:135m", "--head-bits", 4)
    for file in packed(home):
        forget_origin(file)
    answer(capsys, "smollm2:135m")  # and they still serve
    assert len(packed(home)) == 2
    (removed,) = run_json(capsys, "rm", "smollm2:135m")["removed"]
    assert removed["packed_bytes"] > 0
    assert packed(home) == []


def test_rm_leaves_what_an_equal_model_uses(capsys: Capture, tiny: Path, home: Path) -> None:
    first = put(home, "smollm2:135m", tiny)
    put(home, "smollm2:360m", first, link=True)
    answer(capsys, "smollm2:135m")
    answer(capsys, "smollm2:360m")
    assert len(packed(home)) == 1
    (removed,) = run_json(capsys, "rm", "smollm2:135m")["removed"]
    assert removed["packed_bytes"] == 0
    assert removed["freed_bytes"] < 1000  # the file itself is the other's too
    assert len(packed(home)) == 1
    answer(capsys, "smollm2:360m")
    (removed,) = run_json(capsys, "rm", "smollm2:360m")["removed"]
    assert removed["packed_bytes"] > 0
    assert packed(home) == []


def test_clean_shows_and_removes_only_when_told(
    capsys: Capture, tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\n  clean " in run(capsys, "--help")[1]
    assert run(capsys, "clean")[:2] == (0, "there is nothing to clean\n")
    put(home, "smollm2:135m", tiny)
    answer(capsys, "smollm2:135m")
    kept = packed(home)
    gone = home.parent / "gone.gguf"
    write_tiny_model(gone, context=512)
    answer(capsys, gone)
    changed = home.parent / "changed.gguf"
    write_tiny_model(changed, context=1024)
    answer(capsys, changed)
    write_tiny_model(changed, context=768)
    gone.unlink()
    (home / "packed" / "damaged.packed").write_bytes(b"x" * 100)
    nameless = home.parent / "nameless.gguf"
    write_tiny_model(nameless, context=128)
    before = set(packed(home))
    answer(capsys, nameless)
    (old,) = set(packed(home)) - before
    forget_origin(old)
    (home / "tuned").mkdir()
    (home / "tuned" / "other.json").write_text('{"device": {"module": "x", "layout": 1}}')
    for key, age in (("old", 2 * DAY), ("new", 0)):
        folder = home / "staging" / key
        folder.mkdir(parents=True)
        (folder / "m.part").write_bytes(b"1234")
        lock = home / "locks" / f"{key}-gone.lock"
        lock.parent.mkdir(exist_ok=True)
        lock.touch()
        for path in (folder, lock):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    broken = home / "models" / "broken"
    broken.mkdir()
    (broken / "m.gguf").write_bytes(b"x" * 1000)

    found = run_json(capsys, "clean")
    kinds = sorted(one["kind"] for one in found["leftovers"])
    assert kinds == sorted(["download", "lock", "model", "tuned", *["packed"] * 4])
    assert found["size_bytes"] == sum(one["size_bytes"] for one in found["leftovers"])
    assert found["freed_bytes"] == 0
    code, out, err = run(capsys, "clean")
    assert code == 0
    for why in ("has gone", "has changed", "damaged", "did not note the model", "another build"):
        assert why in out
    assert "--yes" in err
    assert all(Path(one["path"]).exists() for one in found["leftovers"])

    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # a pipe: nobody is asked
    assert run(capsys, "clean")[0] == 0
    assert gone.name in run(capsys, "clean")[1]

    removed = run_json(capsys, "clean", "--yes")
    assert removed["freed_bytes"] == found["size_bytes"]
    assert all(one["removed"] for one in removed["leftovers"])
    assert packed(home) == kept
    assert (home / "staging" / "new" / "m.part").exists()
    assert (home / "locks" / "new-gone.lock").exists()
    code, out, err = run(capsys, "clean")
    assert "nothing to clean" in out
    assert "--all-packed" in err
    answer(capsys, "smollm2:135m")
    assert "freed" in run(capsys, "clean", "--all-packed", "--yes")[1]
    assert packed(home) == []
    answer(capsys, "smollm2:135m")
    assert packed(home) == kept


@pytest.mark.parametrize(("answered", "stays"), [("y", False), ("n", True), ("", True)])
def test_clean_asks_in_a_terminal(
    capsys: Capture, home: Path, monkeypatch: pytest.MonkeyPatch, answered: str, stays: bool
) -> None:
    file = home / "packed" / "damaged.packed"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x" * 100)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{answered}\n" if answered else ""))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    code, out, err = run(capsys, "clean")
    assert code == 0
    assert "remove this and free 100 B?" in err
    assert file.exists() == stays
    assert ("100 B freed" in out) != stays


def test_narrow_terminals(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from sartor.cli import screen

    monkeypatch.setattr(screen, "_columns", lambda: 30)
    screen.print_facts([("name", "some words that do not fit into one line"), ("x", "y")])
    assert capsys.readouterr().out.splitlines() == [
        *("name  some words that do not", "      fit into one line", "x     y"),
    ]
    screen.print_table([["A", "B"], ["1" * 20, "2" * 20]], cut=True)
    assert max(map(len, capsys.readouterr().out.splitlines())) == 30


def test_clean_leaves_what_a_process_works_on(capsys: Capture, home: Path) -> None:
    from filelock import FileLock

    folder = home / "staging" / "busy"
    folder.mkdir(parents=True)
    os.utime(folder, (0, 0))
    (home / "locks").mkdir()
    with FileLock(home / "locks" / "busy.lock"):
        assert run_json(capsys, "clean", "--yes")["leftovers"] == []
    assert folder.exists()
    assert [one["removed"] for one in run_json(capsys, "clean", "--yes")["leftovers"]] == [True]


def test_show_reads_the_header_of_a_path(capsys: Capture, tiny: Path, bare: Path) -> None:
    file = run_json(capsys, "show", tiny)["file"]
    assert (file["kind"], file["architecture"], file["makes"]) == ("gguf", "llama", "text")
    assert (file["context_length"], file["layers"], file["width"]) == (2048, 1, 32)
    assert file["problem"] is None
    assert file["parameters"] == sum(one["parameters"] for one in file["formats"])
    assert file["size_bytes"] == sum(one["bytes"] for one in file["formats"])
    assert [one["format"] for one in file["formats"]] == ["fp32"]
    assert file["chat_template"] is True
    ends = [one for one in file["tokenizer"]["special"] if one["role"] == "end"]
    assert ends == [{"role": "end", "id": 257, "text": "<|im_end|>"}]
    assert file["memory"]["fits"] is True
    assert file["memory"]["weights_bytes"] > file["size_bytes"]
    code, out, _ = run(capsys, "show", bare)
    assert code == 0
    assert "no: it continues text" in out
    assert "fits: " in out


def test_show_of_something_too_large(
    capsys: Capture, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sartor.engine import describe

    monkeypatch.setattr(describe, "memory", lambda: (1000, 1000))
    assert run_json(capsys, "show", tiny)["file"]["memory"]["fits"] is False
    assert "does not fit: 1.0 kB are free now" in run(capsys, "show", tiny)[1]


def test_show_of_damaged_files(capsys: Capture, tiny: Path, home: Path) -> None:
    path = put(home, "smollm2:135m", tiny)
    cut = home.parent / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:5000])
    code, out, err = run(capsys, "show", cut)
    assert (code, out) == (1, "")
    assert str(cut) in err
    path.write_bytes(b"\0" * path.stat().st_size)
    shown = run_json(capsys, "show", "smollm2:135m")
    assert shown["file"] is None
    assert "pull it again" in shown["problem"]


def test_show_of_an_architecture_that_is_not_known(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_tiny_model(path)
    path.write_bytes(path.read_bytes().replace(b"llama", b"lamma"))
    file = run_json(capsys, "show", path)["file"]
    assert "'lamma' is not supported" in file["problem"]
    assert (file["context_length"], file["layers"]) == (2048, 1)
    assert file["makes"] is None


def test_texts_of_a_file_do_not_steer_the_terminal(capsys: Capture, tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a\x1b[2Jb\nc\x9b31md")
    writer.add_license("\x07free")
    writer.add_string("general.sampling.temp", "\x1b]0;title\x07")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, out, _ = run(capsys, "show", path)
    assert code == 0
    assert not set(out) & {"\x1b", "\x07", "\x9b"}
    assert "a[2Jb c31md" in out
    assert run_json(capsys, "show", path)["file"]["title"] == "a\x1b[2Jb\nc\x9b31md"


def test_show_of_what_is_not_here(capsys: Capture) -> None:
    shown = run_json(capsys, "show", "gemma3:270m")
    assert (shown["stored"], shown["file"]) == (None, None)
    assert "Instruct" in shown["catalogue"]["title"]
    assert "sartor pull o/m" in run(capsys, "show", "o/m")[1].replace("hf:o/m", "o/m")


def test_show_of_a_folder(capsys: Capture, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    config = {"architectures": ["NewForCausalLM"], "text_config": {"num_hidden_layers": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 3}')
    save_file({"w": np.zeros((4, 8), np.float16)}, tmp_path / "model.safetensors")
    file = run_json(capsys, "show", tmp_path)["file"]
    assert (file["kind"], file["layers"]) == ("safetensors", 3)
    assert file["sampling"]["temperature"] == 0.6
    assert file["formats"] == [{"format": "fp16", "tensors": 1, "parameters": 32, "bytes": 64}]
    assert file["tokenizer"]["problem"]
