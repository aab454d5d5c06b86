"""The predicted time of a training step: each block's arithmetic, and the copies that run beside it.

The link to the host has two directions. What blocks keep leaves in the forward pass and comes back in the backward
pass; streamed weights come in both. The queues are followed block by block, as `streaming` fills them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cogtune.arrangement import Activations, arrange, keep_less
from cogtune.machine import Machine
from cogtune.memory import MemoryPlan
from cogtune.models import ModelFacts
from cogtune.streaming.blocks import DEFAULT_SLOTS, choose_streamed

_LINEAR = 1.017
"""The rate of a step's own products, of the large random one's. Fitted to an H100's products of ones (0.93 of them) and
carried over by what random numbers take."""
_ELEMENTWISE_SHARE = 0.17
"""Time of everything beside a block's products, in each direction, and what the kernels lose in a long step.
Fitted to 2.05 s (keep_all) there; keep_attention then comes out at 2.22 s (measured 2.26), recompute at 2.66 (2.69)."""
_COPY_SHARE = 0.02
"""Part of a copy's time that isn't hidden even where it runs beside longer work: it takes memory bandwidth. A guess."""
_UPDATE_TRAFFIC = 14.0
"""Host memory read and written by an update, in bytes a byte of the weights' copy: three float32 tensors read and
written, the gradient read, the copy written. Counted."""
_BYTES_A_CORE, _MOST_HOST_BYTES = 4.75e9, 100e9
"""What AdamW moves a second on each of a host's cores, and all of them at most. The first from steps of 5B and 2B on 12
cores (57 GB/s), the second a guess."""
_DEVICE_TRAFFIC = 7.0
"""What an update on the device moves in each direction, in the same bytes: the float32 weight and both moments with the
gradient come, the three with the copy go. Counted."""
_BOTH_WAYS = 0.8
"""Part of the link's rate that each direction keeps while both are in use. A guess: with it 5B's steps under 24 and 16
GB, 2/3 of the blocks updated on the device, come out at 3.6 and 3.8 s, where 3.9 and 4.1 were measured."""
_UPDATED_SHARES = ((35e9, 2 / 3), (18e9, 1 / 3))
"""Of the blocks, what the device updates over a link of at least so many bytes a second: PCIe 5's and PCIe 4's. The
steps between are wide, since a result is rounded otherwise on the other side."""
_FLOPS_A_BYTE = 275.0
"""What a device computes while its memory moves a byte: decoding quantized weights reads codes and writes weights. A
guess, from an H100's data sheet (990 TFLOP/s, 3.35 TB/s), of which products reach three quarters."""
_RECOMPUTED: dict[Activations, tuple[float, float]] = {
    "keep_all": (0.0, 0.0),
    "keep_products": (0.03, 0.0),
    "keep_attention": (8 / 12, 0.0),
    "recompute": (8 / 12, 1.0),
}
"""Parts of the linear layers and of attention that run a second time; the feed-forward's last product is never read."""


@dataclass(frozen=True)
class BlockTimes:
    """Seconds of one block on a machine."""

    linear: float
    attention_forward: float
    attention_backward: float

    @classmethod
    def of(
        cls, facts: ModelFacts, tokens: int, batch_size: int, machine: Machine, *, num_ranks: int = 1
    ) -> "BlockTimes":
        """From the block's arithmetic: 12 products of width x width a token, and attention over all tokens.

        `num_ranks` share the work; their messages are not counted.
        """
        width = facts.num_heads * facts.head_dim
        linear = 24 * batch_size * tokens * width**2 / num_ranks
        attention = 4 * batch_size * tokens**2 * width / num_ranks
        return cls(
            linear / (machine.flops * _LINEAR),
            attention / (machine.flops * machine.attention[0]),
            2.5 * attention / (machine.flops * machine.attention[1]),
        )

    def forward_seconds(self) -> float:
        """The forward pass of a block."""
        return (self.linear + self.attention_forward) * (1 + _ELEMENTWISE_SHARE)

    def backward_seconds(self, activations: Activations, *, weight_gradients: bool) -> float:
        """Its backward pass, with what is computed again."""
        linear, attention = _RECOMPUTED[activations]
        own = self.linear * (2 if weight_gradients else 1) + self.attention_backward
        again = self.linear * linear + self.attention_forward * attention
        return (own + again) * (1 + _ELEMENTWISE_SHARE)


@dataclass(frozen=True)
class _Block:
    """Seconds of a block's passes and copies; zero where nothing is copied."""

    forward: float
    backward: float
    weights: float
    leaving: float
    state: float = 0.0
    """What comes for the backward pass on top of the weights, where both go back after it."""

    @property
    def returning(self) -> float:
        """What goes back after the backward pass."""
        return self.weights + self.state if self.state else 0.0


def count_updated(num_layers: int, machine: Machine) -> int:
    """How many blocks the device updates while weights and AdamW's state are on the host.

    It follows from the link alone, so that a run that is resumed on its machine has the same.
    """
    for link, share in _UPDATED_SHARES:
        if machine.link >= link:
            return round(num_layers * share)
    return 0


def predict_seconds(
    plan: MemoryPlan,
    times: BlockTimes,
    machine: Machine,
    *,
    num_layers: int,
    block_bytes: int,
    kept_bytes: Callable[[Activations], float],
    state_bytes: float = 0.0,
    weight_gradients: bool,
) -> float:
    """A step of all blocks, and a little for each copy even where it is hidden.

    `block_bytes` are those of an exact block, `kept_bytes` what a block keeps, `state_bytes` a block's optimizer state
    where it is streamed with the weights.
    """
    block_bytes -= plan.coded.saved_bytes if plan.coded else 0
    decoding = (plan.coded.moved_bytes if plan.coded else 0) * _FLOPS_A_BYTE / machine.flops
    arrangement = arrange(num_layers, num_lean=plan.num_lean, num_offloaded=plan.num_offloaded)
    num_resident = 0 if plan.on_host else num_layers if plan.num_resident is None else plan.num_resident
    streamed = set(choose_streamed(num_layers, num_resident)) if num_resident < num_layers else set()
    lean: Activations = keep_less(plan.activations) or plan.activations
    ways: list[Activations] = [lean if number in arrangement.lean else plan.activations for number in range(num_layers)]
    leaving = [kept_bytes(way) if number in arrangement.offloaded else 0.0 for number, way in enumerate(ways)]
    # The update on the host runs beside the forward pass, which reads it block by block.
    update = 0.0
    if plan.on_host:
        share = plan.num_updated / num_layers
        update = _update_seconds(share, machine, block_bytes=block_bytes, leaving=sum(leaving) / num_layers)
    blocks = []
    for number, way in enumerate(ways):
        own = times.backward_seconds(way, weight_gradients=weight_gradients)
        blocks.append(
            _Block(
                max(times.forward_seconds() + decoding, update),
                own + decoding * (1 + _RECOMPUTED[way][0]),
                block_bytes / machine.link if number in streamed else 0.0,
                leaving[number] / machine.link,
                state_bytes / machine.link if plan.streams_trained and number in streamed else 0.0,
            )
        )
    copying = sum(2 * (block.weights + block.leaving) + block.returning + block.state for block in blocks)
    return _follow(blocks, plan.num_leaving) + _COPY_SHARE * copying


def _update_seconds(share: float, machine: Machine, *, block_bytes: float, leaving: float) -> float:
    """A block's part of an update that the host's cores and, for a `share` of the blocks, the device do at once.

    The link brings the block's own copy meanwhile, and takes the bytes that are `leaving`, both of the mean block.
    """
    on_cores = block_bytes * _UPDATE_TRAFFIC * (1 - share) / min(machine.cores * _BYTES_A_CORE, _MOST_HOST_BYTES)
    moved = block_bytes * _DEVICE_TRAFFIC * share
    return max(on_cores, (moved + max(block_bytes, leaving)) / (machine.link * (_BOTH_WAYS if moved else 1.0)))


def _follow(blocks: list[_Block], num_leaving: int) -> float:
    """When the last backward pass ends: `now` is the time of computing, `outward` and `inward` those of the link."""
    now = outward = inward = 0.0
    held: dict[int, float] = {}  # offloaded blocks that are still on the device, and when their copies are done
    weights = _Weights(blocks)
    for number, block in enumerate(blocks):
        now = max(now, weights.ready(number))
        while held and (len(held) > num_leaving or next(iter(held.values())) <= now):
            now = max(now, held.pop(next(iter(held))))
        now += block.forward
        inward = weights.leave(number, now, inward)
        if block.leaving:
            outward = held[number] = max(outward, now) + block.leaving
    weights.turn()
    arrived: dict[int, float] = {}
    offloaded = [number for number, block in enumerate(blocks) if block.leaving]
    for number in reversed(range(len(blocks))):
        for other in (number, max((other for other in offloaded if other < number), default=number)):
            if not blocks[other].leaving or other in arrived:
                continue
            if other in held:
                arrived[other] = 0.0
                del held[other]
                continue
            now = max([now, *held.values()])  # what is left of the forward pass's copies
            held.clear()
            inward = arrived[other] = max(inward, now) + blocks[other].leaving
        now = max(now, weights.ready(number), arrived.get(number, 0.0)) + blocks[number].backward
        inward = weights.leave(number, now, inward)
    return now


class _Weights:
    """When streamed weights are on the device: each comes when a slot is left."""

    def __init__(self, blocks: list[_Block]) -> None:
        self._order = [number for number, block in enumerate(blocks) if block.weights]
        self._blocks, self._back = blocks, False
        self._ready = dict.fromkeys(self._order[:DEFAULT_SLOTS], 0.0)

    def ready(self, number: int) -> float:
        """When a block's weights are there; 0 if they always are."""
        return self._ready.get(number, 0.0)

    def leave(self, number: int, now: float, inward: float) -> float:
        """A block's slot goes to the next one; when the link is free after it."""
        block = self._blocks[number]
        if not block.weights:
            return inward
        following = self._order.index(number) + DEFAULT_SLOTS
        if following < len(self._order):
            if self._back and block.state:  # what was updated leaves the slot first
                inward = max(inward, now + block.returning) + (block.weights + block.state) / _BOTH_WAYS
            else:
                inward = max(inward, now) + block.weights
            self._ready[self._order[following]] = inward
        return inward

    def turn(self) -> None:
        """The backward pass begins, with the last ones there."""
        self._back = True
        self._order.reverse()
        self._ready = {number: self._ready[number] for number in self._order[:DEFAULT_SLOTS]}
