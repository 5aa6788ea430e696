"""The nouns and wire messages shared by every process. A leaf: imports msgspec and nothing of the project.

Token ids travel as the raw bytes of little-endian int32 (`pack_ids` / `unpack_ids`): a 100 000 token prompt is one
memory copy and no Python objects.
"""

from __future__ import annotations

import sys
from array import array
from enum import IntEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

# ---- errors ---------------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake that the person at the keyboard or the caller of the API can mend; the text says how.

    `param` names the field or flag at fault, where there is one.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class OutOfMemory(UserError):
    """Something does not fit; the text names the flag and a value that would."""


# How matrices lie in memory. "rows": row-major, as in the file; "panels": as the compiled CPU kernels read them
# (engine/native/cpu/cpu.h); "nz": as an Ascend's matrix unit does, which nobody packs: its device makes it of rows.
WeightFormat = Literal["rows", "panels", "nz"]
# "auto": matrices that a GGUF file stores quantised stay so; "none": they are expanded to the dtype; "int8": those stored in
# 16 or 32 bits are quantised at load. In rows nothing that a file quantised is kept, but "int8" quantises every matrix.
Quantization = Literal["auto", "none", "int8"]


class Packing(msgspec.Struct, frozen=True, array_like=True):
    """How a model's weights are to be packed."""

    dtype: str  # float32 | bfloat16 | float16
    format: WeightFormat = "rows"
    quantization: Quantization = "auto"


# ---- token ids on the wire ------------------------------------------------------------------------------------------


def pack_ids(ids: list[int] | array[int]) -> bytes:
    """Token ids as little-endian int32 bytes."""
    packed = array("i", ids)
    if sys.byteorder == "big":  # pragma: no cover - no supported machine is big-endian
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(data: bytes) -> array[int]:
    """The inverse of `pack_ids`."""
    ids = array("i")
    ids.frombytes(data)
    if sys.byteorder == "big":  # pragma: no cover
        ids.byteswap()
    return ids


# ---- sampling -------------------------------------------------------------------------------------------------------

MAX_SAMPLES = 128  # OpenAI's own bound on `n`; a sample's index takes the low 7 bits of its sequence id
MAX_LOGPROBS = 20  # OpenAI's bound on `top_logprobs`


class SamplingParams(msgspec.Struct, omit_defaults=True, kw_only=True):
    """How the next token is chosen and when a text ends. Names and meanings are vLLM's; `temperature=0` is greedy.

    Raises `ValueError` from the constructor where a value can't be meant.
    """

    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] = 1
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1)] = 0  # 0 and -1: every token
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = 16  # None: up to the context's end
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    stop: list[str] = []
    stop_token_ids: list[Annotated[int, Meta(ge=0)]] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    logit_bias: dict[int, Annotated[float, Meta(ge=-100.0, le=100.0)]] = {}
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None  # None: off; k: the chosen one and the top k
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # a plain string is what every client library also allows
            self.stop = [self.stop]
        if any(not s for s in self.stop):
            raise ValueError("stop: an empty string can't end a text; leave it out")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")


def checked(params: SamplingParams) -> SamplingParams:
    """`params` with every range checked: a Struct's constructor checks no types, decoding does.

    Raises `UserError` naming the field.
    """
    try:
        return msgspec.convert(msgspec.to_builtins(params, str_keys=False), SamplingParams)
    except msgspec.ValidationError as e:
        raise UserError(f"sampling parameters: {e}") from None


class Finish(IntEnum):
    """Why a sequence ended, as the TE sees it. Stop strings and cancels are decided in the control process."""

    NONE = 0  # still running
    STOP = 1  # end-of-text or one of `stop_token_ids`
    LENGTH = 2  # `max_tokens` or the context's end
    ERROR = 3  # the TE refused or failed this sequence alone


# ---- messages -------------------------------------------------------------------------------------------------------
# Both directions of one link, array-like on the wire. A sequence id is `task << 7 | sample`.


def sequence_id(task: int, sample: int) -> int:
    return task << 7 | sample


def split_sequence_id(seq: int) -> tuple[int, int]:
    """(task, sample) of a sequence id."""
    return seq >> 7, seq & 127


class Msg(msgspec.Struct, tag=True, array_like=True, omit_defaults=True, gc=False):
    pass


class Sample(msgspec.Struct, array_like=True, gc=False):
    """One of a task's `n` samples: its index and the ids it has already produced (before a crash)."""

    index: int
    generated: bytes  # int32 ids
    seed: int  # always set: the control process draws one where the caller gave none, so that a replay continues


class Handover(msgspec.Struct, array_like=True, gc=False):
    """Where a sequence's keys and values go once they are computed: to blocks that TE `to` has reserved."""

    to: int
    blocks: bytes  # int32: of the sequence, first to last
    cached: int  # tokens, whole blocks of them, that are there already
    # "layer": as each layer of each step is done; "request": after the prompt's last step; "lent": computed there at once, since
    # both TEs use one pool (semi-PD).
    how: Literal["layer", "request", "lent"]


class Start(Msg):
    """Run a task: the prompt once, and a sample for each of `samples`.

    A disaggregated task has two halves. First the decode TE gets it with `expect`: it reserves a slot and blocks for the first
    sample, answers `Reserved` and lets the others wait for that one's prompt. Then the prefill TE gets the first sample alone,
    with the reserved blocks in `handover`: it computes the prompt and one token. It always answers `HandedOver` or `Closed`, and
    from then on writes nothing more there; only then may the decode TE be told to `Adopt` or to `Abort`."""

    task: int
    prompt: bytes  # int32 ids
    samples: list[Sample]
    params: SamplingParams
    max_tokens: int  # resolved against the context; counts `generated` in
    stop_ids: list[int]  # end-of-text ids (unless ignored) and `stop_token_ids`
    salt: bytes = b""  # separates tenants and adapters in the prefix cache
    priority: int = 0
    expect: bool = False
    handover: Handover | None = None
    at: float = 0.0  # CLOCK_MONOTONIC seconds, when this was sent: the time that the cache's priorities go by
    retain: float = 0.0  # seconds for which its blocks are to be kept with priority
    context: str = ""  # the explicit context that the prompt begins with
    preserve: bool = False  # the prompt is that context: keep it under its name


class Adopt(Msg):
    """The keys and values of an expected sequence are there, all but the last id's: go on with it."""

    seq: int
    generated: bytes  # int32 ids


class Move(Msg):
    """Hand a running sequence over as it is now. The answer is `HandedOver`, with fewer than no tokens where it stays."""

    seq: int
    handover: Handover


class Release(Msg):
    """The receiver has a handed over sequence: let its blocks go."""

    seq: int


class Link(Msg):
    """Other TEs whose pools can be written to from now on."""

    peers: list[Peer]


class Unlink(Msg):
    """A TE is gone."""

    te: int


class Share(Msg):
    """Use so much of the compute from now on."""

    percent: int


class Abort(Msg):
    """Forget a sequence (`sample >= 0`) or a whole task at once. Unknown ones are ignored: they may have just ended. For one with
    a handover the answer is `Closed`."""

    task: int
    sample: int = -1


class Forget(Msg):
    """An explicit context was deleted."""

    context: str


class Recount(Msg):
    """Tell all blocks that there are: some of the `BlockNews` was lost."""


class Stop(Msg):
    """Leave now. What is running is dropped."""


ToWorker = Start | Abort | Adopt | Move | Release | Link | Unlink | Share | Forget | Recount | Stop


class Load(msgspec.Struct, array_like=True, gc=False):
    """A TE's load after a step; counters grow over the TE's life."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0  # referenced by live sequences
    blocks_total: int = 0
    steps: int = 0
    step_seconds: float = 0.0  # that they took, in all
    chunk_tokens: int = 0  # of prompts, and of what else was computed in more than one token a step
    chunk_context: int = 0  # ... each times the tokens before its chunk
    decodes: int = 0  # rows of sequences that went on by one token
    decode_context: int = 0  # ... and the tokens of KV that they read
    preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the prefix tree
    prefix_hits: int = 0  # of these, found
    prompt_tokens: int = 0  # computed in prefill
    drafts: int = 0  # speculation: sequences' steps that verified a draft
    draft_tokens: int = 0  # ... ids drafted in them
    accepted_tokens: int = 0  # ... of these, ids that were sampled too
    dram_hits: int = 0  # of `prefix_hits`, tokens loaded from the DRAM tier
    ssd_hits: int = 0  # ... and from the SSD tier
    populates: int = 0  # prompts of which blocks were loaded
    blocks_loaded: int = 0  # load or recompute: blocks of slower tiers that were loaded
    blocks_recomputed: int = 0  # ... and that were there, but quicker to compute
    blocks_swapped: int = 0  # copied to a slower tier, or found there
    blocks_lost: int = 0  # evicted before a slower tier was offered them
    blocks_torn: int = 0  # slots and files that were not what they should have been, refused
    files_unwritten: int = 0  # files that the disk didn't take
    tiers_gone: int = 0  # 1: the keeper died, and this TE goes on without the DRAM and SSD tiers
    dram_bytes: int = 0  # in use in the box's DRAM tier, as this TE last heard
    ssd_bytes: int = 0
    dram_evictions: int = 0  # blocks
    ssd_evictions: int = 0


class Memory(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A memfd that process `pid` holds open as `fd`. Others on the box open it through /proc, and know it by its inode number:
    a process id may have passed to another process."""

    pid: int
    fd: int
    inode: int
    nbytes: int


class DeviceMemory(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Memory of an accelerator that process `pid` has exported under a name (engine/native/ipc.py)."""

    pid: int
    kind: str
    device: int  # as the process that exported it counts
    name: bytes
    nbytes: int


class WeightSource(msgspec.Struct, frozen=True, array_like=True):
    """A running TE that a new one of the same model can take its weights from."""

    te: int
    description: Memory  # engine.weights.Description as msgpack: the model's config and the slabs' manifest
    slabs: list[Memory | DeviceMemory]


# How a TE came by its weights: from a running TE, from packed weights that the keeper had, or packed from the files for it.
LoadPath = Literal["fork", "dram", "disk"]


class KVLayout(msgspec.Struct, frozen=True, array_like=True):
    """Where keys and values lie in a KV pool: of layer l, part p (keys, values, or both together), unit u and head h from byte
    `l * layer_stride + p * part_stride + u * unit_stride + h * head_bytes` on. A block is `block_size / unit_tokens` units, the
    heads of a unit lie side by side, and only pools of equal `format` can exchange blocks."""

    format: str
    layers: int
    layer_stride: int
    parts: int
    part_stride: int
    units: int
    unit_stride: int
    unit_tokens: int
    heads: int
    head_bytes: int
    ranks: int = 1  # of the TE: each has such a pool for heads of its own, `rank_stride` bytes behind the one before
    rank_stride: int = 0


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """A TE whose KV pool others can reach."""

    te: int
    memory: Memory | DeviceMemory
    layout: KVLayout
    block_size: int


class TokenLogprobs(msgspec.Struct, array_like=True, gc=False):
    """Natural-log probabilities of the raw model distribution at one position."""

    chosen: float
    rank: int  # 1: the chosen token was the likeliest
    top_ids: list[int]
    top: list[float]


class Tokens(Msg):
    """What one step brought, for the whole batch, as columns of equal length."""

    seqs: list[int]
    ids: list[int]  # -1: the sequence ended without a token (see `finish`)
    finish: list[int]  # `Finish` values
    load: Load
    logprobs: list[TokenLogprobs | None] | None = None  # None: nobody asked
    prompts: list[PromptDone] | None = None  # sequences whose first token this step brought


class PromptDone(msgspec.Struct, array_like=True, gc=False):
    seq: int
    cached: int  # prompt tokens taken from the prefix cache
    start: float  # CLOCK_MONOTONIC seconds: first chunk began
    logprobs: list[TokenLogprobs | None] | None = None  # of the prompt, where asked; the first is None
    dram: int = 0  # of `cached`, tokens that came from the DRAM tier
    ssd: int = 0  # ... and from the SSD tier


class Refused(Msg):
    """A sequence that can never run here (more blocks than the pool has, say)."""

    seq: int
    why: str


class Reserved(Msg):
    """An expected sequence has a slot and blocks here."""

    seq: int
    blocks: bytes  # int32
    cached: int  # tokens, whole blocks of them, whose keys and values are in the first blocks
    dram: int = 0  # of these, tokens that were loaded from the DRAM tier for it
    ssd: int = 0  # ... and from the SSD tier


class HandedOver(Msg):
    """A sequence's keys and values are in the blocks they were promised to, for its first `tokens` tokens; -1: it was to move and
    stays here, since `why`."""

    seq: int
    tokens: int
    why: str = ""


class Adopted(Msg):
    """The sequence runs here now."""

    seq: int


class Closed(Msg):
    """A sequence with a handover ended here before that was done. Nothing more is written to the blocks it was promised."""

    seq: int


class Ready(Msg):
    """The TE has answered its own dummy request and takes tasks."""

    te: int
    pid: int
    blocks: int
    block_size: int
    steps: dict[str, float]  # scaling-ladder step -> seconds, measured here
    at: float  # CLOCK_MONOTONIC seconds, when this was sent
    memory: dict[str, int]  # bytes: weights, kv
    pool: Peer | None = None  # where other TEs on the box can map the KV cache
    weights: WeightSource | None = None  # what new TEs can take their weights from
    path: LoadPath = "disk"  # how it came by its own
    source: int = -1  # with "fork": the TE it took them from
    mapped: bool = False  # ... whose memory it uses, on an accelerator: it can't outlive that TE
    fell: list[str] = []  # what was tried before, and why it failed
    ranks: list[int] = []  # process ids of the TE's other ranks


class BlockNews(Msg):
    """Which KV blocks with a key a TE has got and lost since the last news; keys are 16 bytes each, one behind the other."""

    number: int  # counts up by one: a gap means that news was lost
    stored: bytes = b""
    evicted: bytes = b""
    dram: bytes = b""  # of the box's slower tiers, as this TE heard of them
    ssd: bytes = b""
    gone: bytes = b""  # ... and what is in none of them any more
    whole: bool = False  # this is all that it has: what was known before is void


class Failed(Msg):
    """The TE can't go on; it leaves after this. `param` names the flag where one would help."""

    why: str
    param: str | None = None


FromWorker = Ready | Tokens | Reserved | HandedOver | Adopted | Closed | Refused | BlockNews | Failed
