"""Where the matrices of a model lie in the flat parts that ZeRO 1 and 2 give to each rank, and how a rank sees the cut ones whole.

A group's tensors lie one after another in one flat vector, each rank holds an equal stretch of it, and stretches end where they end: in
the middle of a matrix. Almost all matrices are whole on some rank. Ranks that share one send each other their pieces, and each computes
it and keeps its own piece. So nothing is approximated, and what travels is about two matrices a rank and group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Fragment:
    """`length` numbers of a tensor from `begin` on, at `start` of a rank's flat part."""

    name: str
    begin: int
    length: int
    start: int


@dataclass(frozen=True)
class Block:
    """`count` matrices [rows, columns], one after another from `start` of the flat part on."""

    start: int
    count: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Cut:
    """A matrix that ranks share, and the pieces that they hold: (rank, begin in the matrix, length), this rank's among them."""

    rows: int
    columns: int
    start: int
    """Of this rank's piece, in its flat part."""
    begin: int
    length: int
    pieces: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Places:
    """The matrices in one rank's flat part of a group."""

    blocks: tuple[Block, ...]
    cuts: tuple[Cut, ...] = ()
    shared: bool = False
    """Whether any ranks of the group share a matrix: then all of them exchange, also those that share none."""
    rank: int = 0
    ranks: int = 1
    group: Any = field(default=None, repr=False)

    def whole(self, flat: Tensor) -> list[Tensor]:
        """The cut matrices, [rows, columns] each, of this part and those of the other ranks. Collective."""
        if not self.shared:
            return []
        mine = [flat[cut.start : cut.start + cut.length] for cut in self.cuts]
        sent: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        sizes = [0] * self.ranks
        for cut, piece in zip(self.cuts, mine, strict=True):
            for rank, _, length in cut.pieces:
                if rank != self.rank:
                    sent[rank].append(piece)
                    sizes[rank] += length
        parts = [piece for pieces in sent for piece in pieces]
        out = torch.cat(parts) if parts else flat.new_empty(0)
        received = flat.new_empty(sum(sizes))
        dist.all_to_all_single(received, out, sizes, [sum(len(piece) for piece in pieces) for pieces in sent], group=self.group)
        return self._assembled(mine, list(received.split(sizes)))

    def _assembled(self, mine: list[Tensor], received: list[Tensor]) -> list[Tensor]:
        read, made = [0] * self.ranks, []
        for cut, own in zip(self.cuts, mine, strict=True):
            matrix = own.new_empty(cut.rows * cut.columns)
            matrix[cut.begin : cut.begin + cut.length] = own
            for rank, begin, length in cut.pieces:
                if rank != self.rank:
                    matrix[begin : begin + length] = received[rank][read[rank] : read[rank] + length]
                    read[rank] += length
            made.append(matrix.view(cut.rows, cut.columns))
        return made


def whole_places(tensor: Tensor) -> Places:
    """Of a matrix or stack that is all here."""
    rows, columns = tensor.shape[-2:]
    return Places((Block(0, tensor.numel() // (rows * columns), rows, columns),))


def places(fragments: Sequence[Sequence[Fragment]], shapes: Mapping[str, tuple[int, ...]], rank: int, group: Any = None) -> Places:
    """The matrices in the part of `rank`, from what each rank of the group holds of which tensor.

    Args:
        fragments: by rank.
        shapes: of the whole tensors, [r, c] or [..., r, c].
    """
    owners: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for holder, held in enumerate(fragments):
        for fragment in held:
            for number, begin, length, _ in _pieces(fragment, shapes[fragment.name]):
                owners.setdefault((fragment.name, number), []).append((holder, begin, length))
    blocks: list[Block] = []
    cuts: dict[tuple[str, int], Cut] = {}
    for fragment in fragments[rank]:
        rows, columns = shapes[fragment.name][-2:]
        first, last = -(-fragment.begin // (rows * columns)), (fragment.begin + fragment.length) // (rows * columns)
        if first < last:
            blocks.append(Block(fragment.start + first * rows * columns - fragment.begin, last - first, rows, columns))
        for number, begin, length, start in _pieces(fragment, shapes[fragment.name]):
            pieces = tuple(owners[fragment.name, number])
            cuts[fragment.name, number] = Cut(rows, columns, start, begin, length, pieces)
    # All ranks in one order: pieces travel without names.
    ordered = tuple(cuts[key] for key in sorted(cuts))
    return Places(tuple(blocks), ordered, bool(owners), rank, len(fragments), group)


def _pieces(fragment: Fragment, shape: tuple[int, ...]) -> Iterator[tuple[int, int, int, int]]:
    """The matrices that a fragment holds a part of: number in the stack, begin in the matrix, length, place in the flat part."""
    size = shape[-2] * shape[-1]
    end = fragment.begin + fragment.length
    for number in {fragment.begin // size, (end - 1) // size}:
        low, high = max(fragment.begin, number * size), min(end, (number + 1) * size)
        if high - low < size:
            yield number, low - number * size, high - low, fragment.start + low - fragment.begin


def fragments_of(engine: Any) -> list[list[Fragment]]:
    """What this rank holds, by parameter group: of a DeepSpeed engine under ZeRO 1 or 2."""
    held: list[list[Fragment]] = [[] for _ in engine.optimizer.param_groups]
    for name, parameter in engine.module.named_parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            held[mapping.param_group_index].append(Fragment(name, here.start, here.numel, there.start))
    return held


def flat_places(engine: Any) -> list[tuple[Tensor, Places]]:
    """The flat part of each group whose rule needs matrices whole, and what lies where in it. Collective."""
    zero, shapes = engine.optimizer, {name: tuple(one.shape) for name, one in engine.module.named_parameters()}
    found = []
    for index, (group, held) in enumerate(zip(zero.param_groups, fragments_of(engine), strict=True)):
        if group["rule"] == "adamw":
            continue
        peers = zero.real_dp_process_group[index]
        everyone: list[Any] = [None] * dist.get_world_size(peers)
        dist.all_gather_object(everyone, held, group=peers)
        found.append((group["params"][0], places(everyone, shapes, dist.get_rank(peers), peers)))
    return found
