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
import resource  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Coroutine, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, TypeVar  # noqa: E402

from engine.config import Config, field_help, several  # noqa: E402
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

    def sleep(self, level: int = 1) -> dict[str, Any]:
        """Let all TEs go; level 1 keeps the packed weights in memory, 2 drops them too. The next call wakes them. Returns the
        bytes that it freed."""
        assert self.engine is not None
        return self.call(self.engine.sleep("", level))

    def wake_up(self) -> dict[str, Any]:
        """Bring the TEs back ahead of the next call: seconds it took, and where the weights came from."""
        assert self.engine is not None
        return self.call(self.engine.wake(""))

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
    more = "; of several the first is the default one and comes up at the start, the others when they are asked for"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=field_help("model") + more)
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


def configs_of(args: argparse.Namespace) -> tuple[list[Config], list[dict[str, str]]]:
    """The Config of each model, and where its values come from."""
    flags = {n: v for n in Config.__struct_fields__ if (v := getattr(args, n)) is not None}
    made = several(flags, args.models, args.config)
    return [config for config, _ in made], [origin for _, origin in made]


async def serve(configs: list[Config]) -> int:
    """Listen at once, load meanwhile, run until a signal; the second one doesn't wait."""
    from engine.native import cpu
    from scale import pull
    from sched import tenants
    from sched.gateway import app as gateway

    first = configs[0]  # also the one that has the server's settings
    # Each TE takes some seven descriptors here, each connection one: take what the system allows, not what a shell starts with.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    keys = tenants.read(Path(first.api_keys_file)) if first.api_keys_file else []
    for config in configs:
        if config.model in pull.KNOWN and not pull.place(config.model).exists():
            await asyncio.to_thread(pull.pull, config.model, say)
    if cpu.find() is None:
        say("building the CPU kernels, some ten seconds")
    engine = AsyncLLM(configs=configs, on_climb=lambda climb: say(climb.said()))
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
            gateway.build(engine, api_keys=first.api_key, keys=keys, version=__version__), first.host, first.port
        )
        say(f"listening on {listener.url}, loading {first.model}")
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
        draining = asyncio.ensure_future(engine.finish(first.shutdown_timeout))
        await asyncio.wait((draining, asyncio.ensure_future(hurry.wait())), return_when=asyncio.FIRST_COMPLETED)
        return 0 if draining.done() and draining.result() else 1
    finally:
        await engine.close()
        if listener is not None:
            await listener.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()


def announce(engine: AsyncLLM, url: str) -> None:
    name, *others = dict.fromkeys(card.root for card in engine.models())
    if others:
        say(f"also served, and brought up when asked for: {', '.join(others)}")
    question = '"messages": [{"role": "user", "content": "Say hello"}]'
    body = f'{{"model": "{name}", "stream": true, "temperature": 0, {question}}}'
    key = ' -H "Authorization: Bearer $KEY"' if engine.needs_key else ""
    say(f"{name} is served at {url}; try:")
    print(f"  curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n    -d '{body}'", file=sys.stderr)


# Settings that do nothing where they are not given; the others find their value.
OFF = ("keep_alive", "slo_ttft_ms", "slo_tpot_ms", "speculative_config")


async def show_config(configs: list[Config], origins: list[dict[str, str]]) -> int:
    """Every setting of each model, its resolved value and why."""
    engine = AsyncLLM(configs=configs)
    try:
        await engine.measure()
        for deployment in engine.deployments:
            await deployment.describe()
    except UserError as e:
        say(f"automatic values are not resolved: {e}")
    for deployment, origin in zip(engine.deployments, origins, strict=True):
        if len(configs) > 1:
            print(f"\n[{deployment.id}]")
        for name in Config.__struct_fields__:
            value = getattr(deployment.config, name)
            absent = "off" if name in OFF else "auto"
            shown = absent if value is None else "(hidden)" if name == "api_key" and value else value
            print(f"{name.replace('_', '-'):24} {shown!s:28} {deployment.why.get(name) or origin[name]}")
    return 0


def profile(args: argparse.Namespace) -> int:
    """Measure a model on this machine for the scheduler."""
    from bench import profile

    made, (origin, *_) = configs_of(args)
    if len(made) > 1:
        raise UserError(f"profile measures one model at a time: name {made[0].model} alone", "model")
    if args.lengths:
        from sched import length_store

        return length_store.main(made[0], args.history, say)
    if args.history is not None:
        raise UserError("--history is for profile --lengths; add --lengths, or leave it out", "history")
    for name in profile.NOT_MEASURED:
        if origin[name].startswith("flag"):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"profile measures colocated TEs, a pair and a semi pair beside each other: leave out {flag}", name)
    return profile.main(made[0], args.budget, args.rates, args.out, args.png, say)


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


async def ps(args: argparse.Namespace) -> int:
    """The TEs and models of a running server, as tables or as JSON."""
    import orjson

    from sched.gateway.client import Client
    from sched.gateway.ps import picture

    async with Client(args.url, args.api_key) as client:
        tes = (await client.ask("GET", "/v1/admin/te"))["data"]
        scale = await client.ask("GET", "/v1/admin/scale")
    if args.json:
        print(orjson.dumps({"te": tes, "scale": scale}, option=orjson.OPT_INDENT_2).decode())
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
        print(picture(tes, scale, time.time(), width))
    return 0


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
    add_config_flags(commands.add_parser("serve", help="serve a model, or several, over HTTP"))
    add_config_flags(commands.add_parser("config", help="print every setting, its resolved value and why"))
    talk = commands.add_parser("chat", help="talk with a running server")
    look = commands.add_parser("ps", help="the task executors and models of a running server")
    for client in (talk, look):
        client.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
        client.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="its key (default: $OPENAI_API_KEY)")
    look.add_argument("--json", action="store_true", help="everything the server tells, as JSON")
    talk.add_argument("--model", help="default: the server's first")
    talk.add_argument("--system", help="a system message")
    talk.add_argument("--temperature", type=float)
    talk.add_argument("--max-tokens", type=int)
    talk.add_argument("--seed", type=int)
    look_at = commands.add_parser("profile", help="measure what the scheduler goes by: the heat map and the costs of a step")
    add_config_flags(look_at)
    look_at.add_argument("--budget", type=float, default=600.0, metavar="S", help="seconds to measure for (default: 600)")
    look_at.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[0.3, 0.6, 0.9],
        metavar="X",
        help="rates to measure at, as parts of what the machine can do of such requests (default: 0.3 0.6 0.9)",
    )
    look_at.add_argument("--out", type=Path, metavar="FILE", help="where the maps go too, as JSON")
    look_at.add_argument("--png", type=Path, metavar="FILE", help="where a picture of the maps goes")
    look_at.add_argument("--lengths", action="store_true", help="instead: train what predicts how long texts get")
    look_at.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help='of --lengths: lines of {"prompt": "…", "length": TOKENS} (default: what the server has kept of its own texts)',
    )
    commands.add_parser("simulate", help="policies on a cluster that isn't there, in virtual time", add_help=False)
    commands.add_parser("pull", help="fetch a model").add_argument("name", metavar="NAME")
    check = commands.add_parser("doctor", help="check what this machine has and what is missing")
    check.add_argument("--selftest", action="store_true", help="run a device against its references; some minutes")
    check.add_argument("--device", choices=sorted(KINDS), help="of --selftest (default: cpu)")
    check.add_argument("--model", help=f"of --selftest's texts and rates (default: {Config().model})")
    check.add_argument("--json", type=Path, metavar="FILE", help="where --selftest writes its report too, to attach to an issue")
    bench = commands.add_parser(
        "bench",
        help="measure: `serve` loads any server, `cpu` sets ours beside others, `cuda` a GPU, `scale` how TEs come and go",
        add_help=False,
    )
    bench.add_argument("what", choices=["serve", "cpu", "cuda", "scale"])
    bench.add_argument("rest", nargs=argparse.REMAINDER)
    return top


def main(argv: list[str] | None = None) -> int:
    args, more = parser().parse_known_args(argv)
    if more and args.command != "simulate":
        parser().error(f"unrecognized arguments: {' '.join(more)}")
    if args.command == "bench":
        from importlib import import_module

        return import_module(f"bench.{args.what}").main(args.rest)
    try:
        if args.command == "serve":
            import uvloop

            return uvloop.run(serve(configs_of(args)[0]))
        if args.command == "config":
            return asyncio.run(show_config(*configs_of(args)))
        if args.command == "profile":
            return profile(args)
        if args.command == "simulate":
            from bench import simulate

            return simulate.main(more, say)
        if args.command == "chat":
            return chat(args)
        if args.command == "ps":
            return asyncio.run(ps(args))
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
