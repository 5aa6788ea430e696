"""What a TE tells after a step: one `Tokens` message for the whole batch, as columns."""

from __future__ import annotations

from engine.types import Finish, Load, PromptDone, TokenLogprobs, Tokens


class Report:
    """The rows that came since the last message."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.seqs: list[int] = []
        self.ids: list[int] = []
        self.finish: list[int] = []
        self.logprobs: list[TokenLogprobs | None] | None = None  # None: nobody asked so far
        self.prompts: list[PromptDone] | None = None

    def row(self, seq: int, token: int, finish: Finish, logprobs: TokenLogprobs | None = None) -> None:
        """A sequence has an id more (-1: none), or ends."""
        self.seqs.append(seq)
        self.ids.append(token)
        self.finish.append(int(finish))
        if logprobs is not None and self.logprobs is None:
            self.logprobs = [None] * (len(self.seqs) - 1)
        if self.logprobs is not None:
            self.logprobs.append(logprobs)

    def prompt(self, done: PromptDone) -> None:
        """The row before is a sequence's first."""
        if self.prompts is None:
            self.prompts = []
        self.prompts.append(done)

    def take(self, load: Load) -> Tokens:
        """The message, and begin anew."""
        message = Tokens(self.seqs, self.ids, self.finish, load, self.logprobs, self.prompts)
        self.clear()
        return message
