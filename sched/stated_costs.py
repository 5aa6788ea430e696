"""What steps would take on hardware that nobody here has, from stated figures. Every figure is in one of the two tables.

A step computes, or reads memory, and the longer of the two is what it takes: prompts compute, decodes read. Marks: [P] stated in
the paper, [H] published by the maker or the model's authors, [A] assumed here, as good as well-made kernels usually are.
"""

from __future__ import annotations

import msgspec

from sched.costs import Costs
from sched.simulate_te import Spec


class Model(msgspec.Struct, frozen=True):
    parameters: float
    layers: int
    hidden: int
    kv_heads: int
    head: int  # numbers of a head

    @property
    def weights(self) -> float:
        """Bytes, in bfloat16."""
        return 2 * self.parameters

    @property
    def kv(self) -> float:
        """Bytes of KV a token."""
        return 2 * 2 * self.layers * self.kv_heads * self.head


class Devices(msgspec.Struct, frozen=True, kw_only=True):
    """The NPUs of one TE, and what is got out of them."""

    count: int
    flops: float  # of each, half precision
    memory: float  # bytes of each
    bandwidth: float  # bytes a second of each one's memory
    link: float  # bytes a second from each one to another server's
    compute: float  # part of `flops` that a prompt's matrices get, all-reduces between the NPUs included
    attention: float  # ... that its attention gets
    read: float  # part of `bandwidth` that a decode step gets
    carry: float  # part of `link` that KV transfers get
    host: float  # seconds a step that are hidden by nothing
    setup: float  # seconds a KV transfer takes beside its bytes: by layer, all but the last one's are sent meanwhile
    kept: float  # part of the memory that weights and KV may fill


MODELS = {
    "34b": Model(parameters=33.74e9, layers=48, hidden=8192, kv_heads=8, head=128),  # CodeLlama-34B [H], the paper's [P]
}
DEVICES = {
    "910b": Devices(
        count=4,  # TP4 [P]
        flops=400e12,  # [P]
        memory=64e9,  # [P]
        bandwidth=1.6e12,  # [A]: HBM2e
        link=200e9 / 8,  # RoCE [P]
        compute=0.5,  # [A]
        attention=0.3,  # [A]
        read=0.6,  # [A]
        carry=0.8,  # [A]
        host=0.003,  # [A]: what is left of it with asynchronous scheduling
        setup=0.005,  # [A]
        kept=0.9,  # [A]
    ),
}
# A step of [A] 0.1 ms a sequence beside its arithmetic: sampling, and the rows that short batches leave empty.
ROW = 0.0001
STEP_TOKENS = 2048  # tokens a step computes at most: DeepServe's default on NPUs
SEATS = 256  # sequences at once [A]
BLOCK = 128  # tokens of a KV block: DeepServe's default on NPUs

STATED = {"34b-910b": ("34b", "910b")}  # what `--costs` may name


def stated(name: str) -> tuple[Costs, Spec]:
    """Costs of a TE, and what it has."""
    model, npus = MODELS[STATED[name][0]], DEVICES[STATED[name][1]]
    flops, bandwidth = npus.count * npus.flops, npus.count * npus.bandwidth * npus.read
    token = 2 * model.parameters / (flops * npus.compute)  # seconds of a token's matrices
    # A token's attention to each token before it: two products over all of the hidden size, in every layer.
    pair = 4 * model.hidden * model.layers / (flops * npus.attention)
    weights = model.weights / bandwidth
    costs = Costs(
        # A full chunk takes far longer than to read the weights, which is hidden behind it.
        p0=npus.host,
        p1=token,
        p2=pair / 2,
        p3=pair,
        d0=npus.host + weights,
        d1=token + ROW,
        d2=model.kv / bandwidth,
        chunk=STEP_TOKENS,
        peer0=npus.setup,
        peer=model.kv / (npus.count * npus.link * npus.carry) / model.layers,  # the last layer's
    )
    room = npus.count * npus.memory * npus.kept - model.weights
    return costs, Spec(seats=SEATS, block=BLOCK, kv_tokens=int(room / model.kv))
