"""DeepServe's front door: the command line, the embeddable classes, and the wiring between them.

from deepserve import LLM, AsyncLLM, SamplingParams
print(LLM("smollm2-135m-instruct").chat([{"role": "user", "content": "Hello"}])[0].outputs[0].text)
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))
if sys.path[:1] != [ROOT]:
    sys.path.insert(0, ROOT)  # `engine`, `sched` and `scale` live beside this file; see sched/__init__.py on the name

import argparse  # noqa: E402
import asyncio  # noqa: E402
import contextlib  # noqa: E402
import signal  # noqa: E402
import threading  # noqa: E402
from collections.abc import Callable, Coroutine, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, TypeVar  # noqa: E402

from engine.config import Config, field_help, resolve  # noqa: E402
from engine.devices import KINDS  # noqa: E402
from engine.types import SamplingParams, UserError  # noqa: E402
from sched.service import AsyncLLM, Message  # noqa: E402
from sched.stream import CompletionOutput, RequestOutput  # noqa: E402

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "Config", "RequestOutput", "SamplingParams", "UserError"]

T = TypeVar("T")


# ---- embedding ----------------------------------------------------------------------------------------------------------


class LLM:
    """The blocking form of `AsyncLLM`, for scripts: its loop runs in a thread of its own. Names and shapes are vLLM's."""

    def __init__(self, model: str | os.PathLike[str] | None = None, **settings: Any):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="deepserve-llm", daemon=True)
        self.thread.start()
        self.engine: AsyncLLM | None = None
        try:
            self.engine = self.call(start_engine(model, settings))
        except BaseException:
            self.close()
            raise

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the engine's loop; an interrupt here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Outputs of one prompt or many (texts or token ids), in order. All run at once, batched by the engine."""
        many: list[Any] = (
            [prompts] if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)) else list(prompts)
        )
        assert self.engine is not None
        return self.call(gather(self.engine, self.engine.generate, many, sampling_params))

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers to one conversation or many."""
        many: list[Any] = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        assert self.engine is not None
        return self.call(gather(self.engine, self.engine.chat, many, sampling_params))

    def close(self) -> None:
        """End the engine's processes. Idempotent."""
        if self.loop.is_closed():
            return
        if self.engine is not None:
            self.call(self.engine.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def start_engine(model: str | os.PathLike[str] | None, settings: dict[str, Any]) -> AsyncLLM:
    return await AsyncLLM(model, **settings).__aenter__()


async def gather(
    engine: AsyncLLM,
    run: Callable[..., Any],
    items: list[Any],
    params: SamplingParams | Sequence[SamplingParams] | None,
) -> list[RequestOutput]:
    """Run all items, no more at once than the engine would admit."""
    if not isinstance(params, Sequence):
        params = [params or SamplingParams()] * len(items)
    if len(params) != len(items):
        raise UserError(
            f"{len(items)} prompts and {len(params)} sampling_params; give one for all or one each", "sampling_params"
        )
    widest = max((p.n for p in params), default=1)
    room = asyncio.Semaphore(
        max(1, (engine.config.max_num_seqs * engine.config.te + engine.config.max_num_queued_reqs) // widest)
    )

    async def one(item: Any, item_params: SamplingParams) -> RequestOutput:
        async with room:
            return [output async for output in run(item, item_params)][-1]

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(i, p)) for i, p in zip(items, params, strict=True)]
    except BaseExceptionGroup as e:
        raise e.exceptions[0] from None  # the rest was cancelled because of it
    return [t.result() for t in tasks]


# ---- command line -------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A progress line for the person who started us."""
    print(f"deepserve: {text}", file=sys.stderr, flush=True)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every Config field. Values stay text here; `engine.config` converts and checks them."""
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help=field_help("model"))
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings; flags override it")
    for name, default in Config.__annotations__.items():
        flag = "--" + name.replace("_", "-")
        if name == "model":
            parser.add_argument(flag, help=argparse.SUPPRESS)
        elif default.startswith("Annotated[bool"):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=field_help(name))
        elif default.startswith("Annotated[list"):
            parser.add_argument(flag, nargs="+", metavar="X", help=field_help(name))
        else:
            parser.add_argument(flag, metavar="X", help=field_help(name))


def config_of(args: argparse.Namespace) -> tuple[Config, dict[str, str]]:
    flags = {n: v for n in Config.__struct_fields__ if (v := getattr(args, n)) is not None}
    if args.model_argument is not None:
        flags["model"] = args.model_argument
    return resolve(flags, args.config)


async def serve(config: Config) -> int:
    """Listen at once, load meanwhile, run until a signal; the second one doesn't wait."""
    from engine.native import cpu
    from scale import pull
    from sched.gateway import app as gateway

    if config.model in pull.KNOWN and not pull.place(config.model).exists():
        await asyncio.to_thread(pull.pull, config.model, say)
    if cpu.find() is None:
        say("building the CPU kernels, some ten seconds")
    engine = AsyncLLM(config=config)
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(name: str) -> None:
        (hurry if stop.is_set() else stop).set()
        say(f"{name}: " + ("stopping now" if hurry.is_set() else "finishing what runs; once more to stop now"))

    for sig in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sig, on_signal, sig.name)
    listener = None
    try:
        engine.start()
        listener = await gateway.listen(
            gateway.build(engine, api_keys=config.api_key, version=__version__), config.host, config.port
        )
        say(f"listening on {listener.url}, loading {config.model}")
        waiting = asyncio.ensure_future(engine.ready())
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait((waiting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            waiting.result()
            announce(engine, listener.url)
        else:
            waiting.cancel()
        failing = asyncio.ensure_future(engine.failed.wait())
        await asyncio.wait((stopping, failing), return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            raise engine.failure or UserError("the engine failed")
        draining = asyncio.ensure_future(engine.drain(config.shutdown_timeout))
        await asyncio.wait((draining, asyncio.ensure_future(hurry.wait())), return_when=asyncio.FIRST_COMPLETED)
        return 0 if draining.done() and draining.result() else 1
    finally:
        await engine.close()
        if listener is not None:
            await listener.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()


def announce(engine: AsyncLLM, url: str) -> None:
    assert engine.cluster is not None
    for climb in engine.cluster.climbs:  # of a pair both
        say(f"TE {climb.te} ready after {climb.total:.2f} s: " + ", ".join(f"{k} {v:.2f}" for k, v in climb.steps.items()))
    question = '"messages": [{"role": "user", "content": "Say hello"}]'
    body = f'{{"model": "{engine.names[0]}", "stream": true, "temperature": 0, {question}}}'
    key = ' -H "Authorization: Bearer $KEY"' if engine.api_keys else ""
    say(f"{engine.names[0]} is served at {url}; try:")
    print(f"  curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n    -d '{body}'", file=sys.stderr)


async def show_config(config: Config, origin: dict[str, str]) -> int:
    """Every setting, its resolved value and why."""
    from scale import pull
    from sched.service import make_plan

    try:
        plan, why = await asyncio.to_thread(make_plan, pull.resolve(config.model), config)
        config = plan.config
    except UserError as e:
        say(f"automatic values are not resolved: {e}")
        why = {}
    for name in Config.__struct_fields__:
        value = getattr(config, name)
        absent = "off" if name == "speculative_config" else "auto"
        shown = absent if value is None else "(hidden)" if name == "api_key" and value else value
        print(f"{name.replace('_', '-'):24} {shown!s:28} {why.get(name) or origin[name]}")
    return 0


def chat(args: argparse.Namespace) -> int:
    """A conversation with a running server, in the terminal. Ctrl-C while it answers ends the answer."""
    from sched.gateway.client import Client

    messages: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    settings = {k: v for k in ("temperature", "max_tokens", "seed") if (v := getattr(args, k)) is not None}
    answer: list[str] = []

    async def model() -> str:
        async with Client(args.url, args.api_key) as client:
            return (await client.models())[0]

    async def reply(name: str) -> None:
        async with Client(args.url, args.api_key) as client:
            async for event in client.chat(messages, model=name, **settings):
                print(event.text, end="", flush=True)
                answer.append(event.text)

    name = args.model or asyncio.run(model())
    print(f"{name} at {args.url}. An empty line or Ctrl-D ends.", file=sys.stderr)
    while line := ask():
        messages.append({"role": "user", "content": line})
        answer.clear()
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(reply(name))
        print()
        messages.append({"role": "assistant", "content": "".join(answer)})
    return 0


def ask() -> str:
    """A line from the person; empty at the end of input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def selftest(device: str, model: str, report: Path | None) -> int:
    """A device against its references, in this process: nothing is served."""
    from engine.devices import selftest
    from scale import pull

    path, why_not = None, ""
    try:
        path = pull.pull(model, say) if model in pull.KNOWN else pull.resolve(model)
    except UserError as e:
        why_not = str(e)
    return selftest.main(device, path, why_not, report, f"deepserve.py doctor --selftest --device {device} --model {model}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="deepserve", description="LLM serving on NPUs, edge machines and CPUs.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_config_flags(commands.add_parser("serve", help="serve a model over HTTP"))
    add_config_flags(commands.add_parser("config", help="print every setting, its resolved value and why"))
    talk = commands.add_parser("chat", help="talk with a running server")
    talk.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    talk.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="its key (default: $OPENAI_API_KEY)")
    talk.add_argument("--model", help="default: the server's first")
    talk.add_argument("--system", help="a system message")
    talk.add_argument("--temperature", type=float)
    talk.add_argument("--max-tokens", type=int)
    talk.add_argument("--seed", type=int)
    commands.add_parser("pull", help="fetch a model").add_argument("name", metavar="NAME")
    check = commands.add_parser("doctor", help="check what this machine has and what is missing")
    check.add_argument("--selftest", action="store_true", help="run a device against its references; some minutes")
    check.add_argument("--device", choices=sorted(KINDS), help="of --selftest (default: cpu)")
    check.add_argument("--model", help=f"of --selftest's texts and rates (default: {Config().model})")
    check.add_argument("--json", type=Path, metavar="FILE", help="where --selftest writes its report too, to attach to an issue")
    bench = commands.add_parser(
        "bench", help="measure: `serve` loads any server, `cpu` sets ours beside others, `cuda` a GPU", add_help=False
    )
    bench.add_argument("what", choices=["serve", "cpu", "cuda"])
    bench.add_argument("rest", nargs=argparse.REMAINDER)
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command == "bench":
        from importlib import import_module

        return import_module(f"bench.{args.what}").main(args.rest)
    try:
        if args.command == "serve":
            import uvloop

            return uvloop.run(serve(config_of(args)[0]))
        if args.command == "config":
            return asyncio.run(show_config(*config_of(args)))
        if args.command == "chat":
            return chat(args)
        if args.command == "pull":
            from scale import pull

            print(pull.pull(args.name, say))
            return 0
        if args.selftest:
            return selftest(args.device or "cpu", args.model or Config().model, args.json)
        if args.device or args.model or args.json:
            raise UserError("--device, --model and --json are for doctor --selftest; add it, or leave them out")
        from scale import doctor

        return doctor.main()
    except UserError as e:
        say(f"error: {e}")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
