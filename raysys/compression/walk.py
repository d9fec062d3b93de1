"""A model's perplexity without the model in memory: all windows through one layer, then through the next.

Legend: N windows, L positions, D width, V vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from raysys.compression.blocks import Skeleton
from raysys.compression.calibration import TokenWindows
from raysys.compression.shards import EMBEDDING, NORM
from raysys.compression.streams import Stream
from raysys.evaluation.perplexity import Perplexity, window_nll


@torch.no_grad()
def walk(
    skeleton: Skeleton,
    windows: TokenWindows,
    layer: Callable[[int], Mapping[str, Tensor]],
    tensor: Callable[[str], Tensor],
    unembedding: Callable[[], Tensor],
    folder: Path,
    batch: int = 8,
    biases: Mapping[int, Tensor] | None = None,
    told: Callable[[int], None] | None = None,
    final: Tensor | None = None,
) -> Perplexity:
    """Perplexity of the windows' tokens from each one's start on, and which of the whole answers greedy decoding would write.

    Args:
        skeleton: of the model.
        layer: weights of a layer by names relative to it.
        tensor: of the others by name.
        unembedding: [V, D].
        folder: where hidden states may lie meanwhile; emptied.
        biases: by layer, what is added to the norm after attention.
        told: called with each layer that is done.
        final: what is added to the norm before the head.
    """
    shape = (*windows.ids.shape, int(skeleton.config.hidden_size))
    shutil.rmtree(folder, ignore_errors=True)
    stream = Stream(folder, "walk", shape, skeleton.dtype)  # type: ignore[arg-type]
    slices = [slice(start, start + batch) for start in range(0, len(windows), batch)]
    ids, table = torch.from_numpy(windows.ids).long(), tensor(EMBEDDING)
    with stream.write(0) as states:
        for rows in slices:
            states[rows] = table[ids[rows]]
    del table
    layers = int(skeleton.config.num_hidden_layers)
    for i in range(layers):
        block = skeleton.block(i, layer(i))
        block.bias = None if not biases or i not in biases else biases[i].to(skeleton.device)
        before = stream.read(i)
        with stream.write(i + 1) as after:
            for rows in slices:
                after[rows] = block.feed(block.attend(before[rows].to(skeleton.device)))
        stream.drop(before=i + 1)
        if told is not None:
            told(i)
    found = _ends(skeleton, windows, stream, layers, tensor(NORM), unembedding(), final)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _ends(
    skeleton: Skeleton, windows: TokenWindows, stream: Stream, layers: int, norm: Tensor, head: Tensor, final: Tensor | None
) -> Perplexity:
    head = head.to(skeleton.device, skeleton.dtype)
    states, found = stream.read(layers), Perplexity()
    for number in range(len(windows)):
        length = int(windows.lengths[number])
        last = skeleton.norm(states[number : number + 1].to(skeleton.device), {"weight": norm}, final)[0, :length]
        own = torch.from_numpy(windows.ids[number, :length]).long().to(skeleton.device)
        start, greedy = int(windows.starts[number]), True
        # Logits of a prompt are not needed, and those of a long window are many: only what is counted is made.
        for first in range(start, length, 512):
            end = min(first + 512, length)
            logits = last[first - 1 : end] @ head.T
            found.add(*window_nll(logits, own[first - 1 : end]))
            greedy &= torch.equal(logits[:-1].argmax(-1), own[first:end])
        if windows.whole[number]:  # of half an answer nobody can say whether it is right
            found.end(greedy)
    return found
