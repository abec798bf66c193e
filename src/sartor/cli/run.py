"""``sartor run``: an answer, or a chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sartor.cli import options, presets
from sartor.cli.answer import Answer, follow, more_context
from sartor.cli.display import open_display
from sartor.cli.screen import print_json, say, write_text
from sartor.cli.settings import settings_of
from sartor.cli.terminal import is_terminal, remark
from sartor.printable import plain
from sartor.progress.line import ProgressLine

if TYPE_CHECKING:
    from sartor.engine.llm import LLM
    from sartor.engine.load import LoadedModel
    from sartor.engine.request import Chunk
    from sartor.graph import SamplingParams
    from sartor.plan import ExecutionPlan


def run(
    call: typer.Context,
    model: options.Model,
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to answer. Text from a pipe or a file (cat FILE | sartor run ..., or "
            "< FILE) follows it after an empty line, or is the prompt. Without both: chat.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is: no chat template.")
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="System prompt and sampling of this name in sartor.toml.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 always takes the likeliest token.", show_default="the model's own, else 0.7"
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Keep the likeliest tokens of this total.",
            show_default="the model's own, else 0.95",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Keep so many likeliest tokens; 0 keeps all.",
            show_default="the model's own, else 0",
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Drop tokens below this share of the likeliest one.",
            show_default="the model's own, else 0",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Above 1: tokens that were there already get less likely.",
            show_default="the model's own, else 1",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Equal seeds give equal answers.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 1024,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the answer before this text (may be repeated)."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Answer with a LoRA adapter.", show_default=False),
    ] = None,
    special_in_text: options.SpecialInText = False,
    threads: options.Threads = 0,
    context: options.Context = 0,
    backend: options.Backend = "auto",
    device: options.Device = "auto",
    kv: options.Kv = "bf16",
    activation: options.Activation = "int8",
    head_bits: options.HeadBits = 0,
    isa: options.Isa = "auto",
    markdown: Annotated[
        bool, typer.Option(help="On a terminal, show Markdown as text with style.")
    ] = True,
    history: Annotated[
        bool, typer.Option(help="Keep what is typed in a chat for the next one.")
    ] = True,
    json: options.Json = False,
) -> None:
    """Answer a prompt, or chat when there is none.

    The answer goes to standard output while it is made; the speed follows on standard error.
    """
    from sartor.cli.piped import is_piped, read_piped
    from sartor.engine.preset import Preset
    from sartor.errors import CapacityError, UsageError

    model, found = presets.chosen(settings_of(call), model, preset)
    way = found or Preset("")
    system = way.system if system is None else system
    if raw and system is not None:
        raise UsageError("run: --raw writes no chat, so it has no place for --system; drop one")
    if not is_terminal(sys.stdin) and (prompt is None or is_piped()):
        text = read_piped()
        if not text.strip() and prompt is None:
            raise UsageError(
                "run: standard input is empty; write a PROMPT, or start it on a terminal to chat"
            )
        prompt = "\n\n".join(part for part in (prompt, text) if part and part.strip())
    if prompt is not None and not prompt.strip():
        raise UsageError("run: the prompt is empty; write one, or leave it out to chat")
    if prompt is None and (json or raw):
        option = "--json" if json else "--raw"
        raise UsageError(f"run: {option} needs a PROMPT; a chat has none")
    from sartor.graph import SamplingParams, describe_sampling

    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    given, filed = presets.asked(call, sampling)
    params = SamplingParams(
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
    )
    plan = options.make_plan(
        threads=threads,
        context=context,
        backend=backend,
        device=device,
        kv=kv,
        activation=activation,
        head_bits=head_bits,
        isa=isa,
        max_sequences=1,  # one conversation: its state is all that is needed
    )
    loaded, llm = _open(model, plan)
    for note in loaded.notes:
        say(plain(f"note: {note}"))
    with llm:
        if not loaded.writes_text:
            raise UsageError(
                f"run: {loaded.name} makes vectors of texts and writes none; use LLM.embed in "
                "Python, or /v1/embeddings of `sartor serve`"
            )
        layers = (given, way.sampling, filed, loaded.sampling)
        params = params.resolved(*layers)
        for note in loaded.sampling.notes:
            say(plain(f"note: {note}"))
        name = ""
        if adapter is not None:
            name = "adapter"  # a folder may have no name of its own: "."
            llm.load_adapter(name, adapter)
        if loaded.template is None and (prompt is None or system is not None):
            raise UsageError(
                f"{loaded.name} has no chat template: it continues a PROMPT, and takes no --system"
            )
        if loaded.template is not None and loaded.template.fault and not raw:
            raise UsageError(f"{loaded.name}: {loaded.template.fault}; --raw continues a PROMPT")
        if prompt is None:
            from sartor.cli.chat import chat

            if any(layer.said() for layer in layers):
                say(f"sampling: {describe_sampling(*layers)}")
            chat(
                llm,
                loaded,
                params,
                system,
                name,
                variables=way.template,
                special_in_text=special_in_text,
                markdown=markdown,
                history=history,
            )
            return
        template = {**way.template, "special_in_text": special_in_text}
        chunks = _answer(llm, loaded, prompt, params, system, raw, name, template)
        if json:
            answer = follow(chunks, _ignore)
        else:
            display = open_display(markdown)
            try:
                answer = follow(chunks, display.feed)
            except CapacityError as error:
                raise CapacityError(f"{error}{more_context(loaded, llm.context_length)}") from None
            finally:
                display.end()
            if not answer.text:
                write_text("\n")
        context = llm.context_length
    if json:
        from sartor.cli.sampling import sampling_values

        print_json(_report(loaded, answer) | {"sampling": sampling_values(*layers)})
        return
    if answer.finish_reason == "length":
        if answer.prompt_tokens + answer.completion_tokens >= context:
            remark(f"(the answer reached the end of the context, {context} tokens)")
        else:
            remark(f"(the answer reached --max-tokens, {answer.completion_tokens})")
    remark(answer.speed())


def _open(model: str, plan: ExecutionPlan) -> tuple[LoadedModel, LLM]:
    from sartor.store import ModelStore, sartor_home

    progress = ProgressLine()
    stored = ModelStore().ensure(model, progress)
    from sartor.engine.llm import LLM
    from sartor.engine.load import load

    loaded = load(stored.path, plan, stored.name, sartor_home() / "packed", progress=progress)
    return loaded, LLM.from_loaded(loaded)


def _answer(
    llm: LLM,
    loaded: LoadedModel,
    prompt: str,
    params: SamplingParams,
    system: str | None,
    raw: bool,
    adapter: str,
    template: Mapping[str, Any],
) -> Iterator[Chunk]:
    """The chat template where there is one; a model without continues the text."""
    if raw or loaded.template is None:
        return llm.stream(prompt, params, adapter=adapter)
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return llm.chat(messages, params, stream=True, adapter=adapter, **template)


def _report(loaded: LoadedModel, answer: Answer) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "completion_tokens": answer.completion_tokens,
        "load_seconds": loaded.load_seconds,
        "prompt_seconds": answer.prompt_seconds,
        "decode_seconds": answer.decode_seconds,
        "prompt_tokens_per_second": answer.prompt_rate,
        "decode_tokens_per_second": answer.decode_rate,
    }


def _ignore(text: str) -> None:
    """With --json the text is shown once, whole."""
    del text
