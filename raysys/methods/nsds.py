"""NSDS: which layers of a model get more bits, told from the weights alone. Paper: arXiv 2603.17354.

Legend: L layers, D model width, F MLP width, H query and K key-value heads of h dimensions, V vocabulary; weights as `nn.Linear` stores
them [out, in]. Five components of a layer are scored, each numerically (NV) and structurally (SE):

    up, gate        detectors  their input directions count      beta = log(1 + relu(kurt v))
    QK, each head   detectors  Wq_i^T Wk_j [D, D], both sides     beta = log(1 + relu(kurt u) relu(kurt v))
    down            writers    its output directions count        beta = ||P^T u||
    OV, each head   writers    Wo_i Wv_j [D, D]                   beta = ||P^T u||

    NV = excess kurtosis of all entries;  SE = (sum t) exp(entropy of t / sum t),  t = singular values times beta
    z  = (r - median r) / (1.4826 MAD r) across layers,  p = sigmoid(z),  S = 1 - prod(1 - p)

P spans the unembedding's right singular space; spectra are cut at 99 % of their energy. Where paper and the authors' program disagree:
the product form of SE, MAD times 1.4826, a plain product in Soft-OR, head_dim as the config has it. Nothing is drawn at random.

All of it computes in float64, on the device of the weights. Of a circuit, no [D, D] matrix is decomposed: QR of its factors leaves one of
h x h. Of an MLP matrix only one side is needed: the Gram matrix of width D, or that of F where it is smaller, as experts have it.

The authors do not say what a mixture of E experts is. Here NV and SE of its up, gate and down are means over experts, which have equally
many weights; the router is not scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Form = Literal["product", "ratio"]
FORMS: tuple[Form, ...] = ("product", "ratio")
COMPONENTS = ("up", "gate", "qk", "down", "ov")
SERIES = tuple(f"{component}/{kind}" for kind in ("nv", "se") for component in COMPONENTS)
"""What `layer_series` returns, in its order."""
_MLP = ("gate_proj", "up_proj", "down_proj")
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", *_MLP)
ENERGY = 0.99
_LEAST = 2
"""Directions that are kept at least."""
_NORMAL = 1.4826
"""MAD times this is the standard deviation of a normal distribution."""
_NEGLIGIBLE = 1e-12
"""A spread below this share of the largest value is rounding."""
_ROUNDING = 1e-9
"""Bits by which a budget may be off: it is a decimal fraction, or a sum of such."""
_BLOCK = 2**22
"""Entries of a circuit's matrix, or of a block of the unembedding, that exist at once."""
_PIECE = 2**20
"""Entries whose moments are taken at once."""


def excess_kurtosis(x: Tensor) -> float:
    """Excess kurtosis over all entries, by population moments. 0 of a constant.

    Raises:
        ValueError: there is no entry, or one that is no finite number.
    """
    if not x.numel():
        raise ValueError(f"x must have entries, got shape {list(x.shape)}")
    return _entries_kurtosis(_finite("x", x))


def structural_expressiveness(singular_values: Tensor, role_weights: Tensor, form: Form = "product") -> float:
    """SE of one spectrum: magnitude times (or, as the authors' program has it, over) the effective rank.

    Args:
        singular_values, role_weights: [k], neither negative.

    Returns:
        Of n equal terms t: `n t * n` or `n t / n`. 0 where all terms are 0.

    Raises:
        ValueError: shapes differ, a number is negative or not finite, or there is no such form.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    values, weights = _finite("singular_values", singular_values), _finite("role_weights", role_weights)
    if values.dim() != 1 or values.shape != weights.shape:
        raise ValueError(f"singular_values and role_weights must both be [k], got {list(values.shape)} and {list(weights.shape)}")
    for name, tensor in (("singular_values", values), ("role_weights", weights)):
        if bool((tensor < 0).any()):
            raise ValueError(f"{name} must not be negative, got {tensor.min().item():g}")
    terms = values * weights
    total = float(terms.sum())
    if total <= 0:
        return 0.0
    rank = math.exp(float(torch.special.entr(terms / total).sum()))
    return total * rank if form == "product" else total / rank


def mad_sigmoid(r: Tensor) -> Tensor:
    """Values [L] to (0, 1) by their distance from the median in robust standard deviations.

    The median goes to 0.5. Where more than half the values are equal (MAD = 0) the population's standard deviation takes its place; where
    all are equal, all go to 0.5.

    Raises:
        ValueError: r is no [L], or holds what is no finite number.
    """
    return torch.sigmoid(_robust(r))


def soft_or(p: Tensor) -> Tensor:
    """1 - prod(1 - p) over the first axis: [M, L] to [L].

    Raises:
        ValueError: p is no [M, L], or leaves [0, 1].
    """
    p = _finite("p", p)
    if p.dim() != 2:
        raise ValueError(f"p must be [M, L], got shape {list(p.shape)}")
    if bool(((p < 0) | (p > 1)).any()):
        raise ValueError(f"p must lie in [0, 1], got {p.min().item():g} to {p.max().item():g}")
    return -torch.expm1(torch.log1p(-p).sum(dim=0))


def layer_scores(
    layers: Sequence[Mapping[str, Tensor]],
    unembedding: Tensor,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    energy: float = ENERGY,
    form: Form = "product",
) -> Tensor:
    """Sensitivity of each layer, [L] float64: -sum log(1 - p) of its ten series.

    That orders layers as the paper's S = 1 - prod(1 - p) does, and does not saturate: with ten series most S round to 1.

    Args:
        layers: of each the weights in `NAMES`.
        unembedding: [V, D].
        n_heads, n_kv_heads, head_dim: H, K, h; query heads i share the key-value head i // (H / K).
        energy: share of the squared singular values that is kept.
        form: of SE, see `structural_expressiveness`.

    Raises:
        ValueError: a weight is missing, of the wrong shape, or holds what is no finite number; the message names the layer and the weight.
    """
    basis = unembedding_basis(unembedding, energy)
    rows = []
    for number, layer in enumerate(layers):
        try:
            rows.append(layer_series(layer, basis, n_heads, n_kv_heads, head_dim, energy, form))
        except ValueError as error:
            raise ValueError(f"layer {number}: {error}") from None
    if not rows:
        raise ValueError("layers must not be empty")
    return combine(torch.stack(rows))


def combine(series: Tensor) -> Tensor:
    """Scores of layers from their series, [L, M] to [L]: see `layer_scores`. Raises ValueError for another shape or what is not finite."""
    if series.dim() != 2:
        raise ValueError(f"series must be [L, M], got shape {list(series.shape)}")
    return torch.stack([torch.nn.functional.softplus(_robust(one)) for one in series.unbind(dim=1)]).sum(dim=0)


def unembedding_basis(unembedding: Tensor, energy: float = ENERGY) -> Tensor:
    """Leading right singular vectors of [V, D] as columns, [D, r] float64. Raises ValueError: see `layer_scores`."""
    if unembedding.dim() != 2:
        raise ValueError(f"unembedding must be [V, D], got shape {list(unembedding.shape)}")
    _check_energy(energy)
    width = unembedding.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=unembedding.device)
    for block in unembedding.split(max(1, _BLOCK // max(1, width))):
        part = _finite("unembedding", block)
        gram.addmm_(part.T, part)
    return _leading(gram, energy)[1]


def layer_series(
    layer: Mapping[str, Tensor],
    basis: Tensor,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    energy: float = ENERGY,
    form: Form = "product",
) -> Tensor:
    """The ten raw numbers of one layer in the order of `SERIES`, float64; only they need all layers' weights, one after another.

    Args:
        layer: the weights in `NAMES`; of a mixture, gate_proj, up_proj and down_proj are stacks of its experts' [E, out, in].
        basis: of `unembedding_basis`, [D, r].

    Raises:
        ValueError: see `layer_scores`.
    """
    _check_energy(energy)
    weights = _checked(layer, len(basis), n_heads, n_kv_heads, head_dim)
    stacks = {name: weight if weight.dim() == 3 else weight.unsqueeze(0) for name, weight in weights.items() if name in _MLP}
    found = [_mlp(dict(zip(stacks, parts, strict=True)), basis, energy, form) for parts in zip(*stacks.values(), strict=True)]
    means = {key: math.fsum(one[key] for one in found) / len(found) for key in found[0]}
    means["qk/nv"], means["qk/se"], means["ov/nv"], means["ov/se"] = _circuits(weights, basis, n_heads, n_kv_heads, energy, form)
    return torch.tensor([means[name] for name in SERIES], dtype=torch.float64)


def _mlp(weights: Mapping[str, Tensor], basis: Tensor, energy: float, form: Form) -> dict[str, float]:
    """NV and SE of one MLP by their names in `SERIES`."""
    found: dict[str, float] = {}
    for name in ("up", "gate", "down"):
        values, vectors = _one_side(f"{name}_proj", weights[f"{name}_proj"], int(name != "down"), energy)
        role = _written(basis, vectors) if name == "down" else torch.log1p(_kurtosis(vectors).relu())
        del vectors  # as large as what the next matrix needs
        found[f"{name}/se"] = structural_expressiveness(values, role, form)
        found[f"{name}/nv"] = _entries_kurtosis(weights[f"{name}_proj"])
    return found


def allocate(scores: Tensor | Sequence[float], sizes: Tensor | Sequence[int], budget: float, low: int = 2, high: int = 4) -> list[int]:
    """Bits of each layer: `high` for the most sensitive ones until the next would exceed the budget, `low` for the others.

    Ties go to the layer that comes first. A larger budget never takes bits from a layer.

    Args:
        scores, sizes: of L layers; sizes count the weights that are quantised.
        budget: bits of a weight on average.

    Raises:
        ValueError: lengths differ, a score is no finite number, a size is not positive, `low` is not below `high`, or the budget is not
            between them.
    """
    ranks = _finite("scores", torch.as_tensor(scores, dtype=torch.float64))
    counts = [float(size) for size in sizes]
    if ranks.dim() != 1 or len(ranks) != len(counts):
        raise ValueError(f"scores and sizes must both be [L], got {list(ranks.shape)} and {len(counts)} sizes")
    if not all(math.isfinite(size) and size > 0 for size in counts):
        raise ValueError(f"sizes must be positive, got {min(counts):g}")
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    if not low - _ROUNDING <= budget <= high + _ROUNDING:
        raise ValueError(f"budget must lie in [{low}, {high}], got {budget}")
    bits, total = [low] * len(counts), sum(counts)
    spare = (budget - low) * total
    for layer in torch.argsort(ranks, descending=True, stable=True).tolist():
        cost = (high - low) * counts[layer]
        if cost > spare + _ROUNDING * total:  # relative: real layers hold 1e8 weights
            break
        bits[layer], spare = high, spare - cost
    return bits


def _one_side(name: str, matrix: Tensor, along: int, energy: float) -> tuple[Tensor, Tensor]:
    """Leading values and vectors of W W^T (`along` 0) or W^T W (1), W [out, in].

    Nothing of W's size exists in float64: blocks of rows, or of columns, are summed up. Where the other side is shorter it is decomposed,
    and its vectors, which W carries over, are as many.
    """
    short = along if matrix.shape[along] <= matrix.shape[1 - along] else 1 - along
    numbers = _BLOCK // max(1, matrix.shape[short]) or 1
    gram = torch.zeros(matrix.shape[short], matrix.shape[short], dtype=torch.float64, device=matrix.device)
    for block in matrix.split(numbers, dim=1 - short):
        part = _finite(name, block if short == 1 else block.T)
        gram.addmm_(part.T, part)
    values, vectors = _leading(gram, energy)
    if short != along:
        carried = matrix.double() @ vectors if along == 0 else matrix.double().T @ vectors
        vectors = carried / values.where(values > 0, 1.0)
    return values, vectors


def _circuits(
    weights: Mapping[str, Tensor], basis: Tensor, n_heads: int, n_kv_heads: int, energy: float, form: Form
) -> tuple[float, float, float, float]:
    """NV and SE of the QK circuits, then of the OV circuits, each the mean over query heads."""
    queries, outputs = weights["q_proj"].chunk(n_heads), weights["o_proj"].chunk(n_heads, dim=1)
    keys = [(one.T, *torch.linalg.qr(one.T)) for one in _finite("k_proj", weights["k_proj"]).chunk(n_kv_heads)]
    values = [(one.T, *torch.linalg.qr(one.T)) for one in _finite("v_proj", weights["v_proj"]).chunk(n_kv_heads)]
    sums = [0.0] * 4
    for head in range(n_heads):
        query, output = _finite("q_proj", queries[head]), _finite("o_proj", outputs[head])
        shared = head * n_kv_heads // n_heads
        left, spectrum, right = _decomposed(query.T, keys[shared], energy)
        sums[0] += _product_kurtosis(query.T, keys[shared][0])
        sums[1] += structural_expressiveness(spectrum, torch.log1p(_kurtosis(left).relu() * _kurtosis(right).relu()), form)
        left, spectrum, _ = _decomposed(output, values[shared], energy)
        sums[2] += _product_kurtosis(output, values[shared][0])
        sums[3] += structural_expressiveness(spectrum, _written(basis, left), form)
    nv_qk, se_qk, nv_ov, se_ov = (one / n_heads for one in sums)
    return nv_qk, se_qk, nv_ov, se_ov


def _decomposed(first: Tensor, second: tuple[Tensor, Tensor, Tensor], energy: float) -> tuple[Tensor, Tensor, Tensor]:
    """Leading left vectors, singular values and right vectors of A B^T. `first` is A [D, h]; `second` B with its Q and R."""
    q, r = torch.linalg.qr(first)
    left, spectrum, right = torch.linalg.svd(r @ second[2].T)
    kept = _kept(spectrum.square(), energy)
    return q @ left[:, :kept], spectrum[:kept], second[1] @ right[:kept].T


def _product_kurtosis(first: Tensor, second: Tensor) -> float:
    """Excess kurtosis of all entries of A B^T, which exists in blocks of rows."""
    count = len(first) * len(second)
    mean = (first.sum(dim=0) @ second.sum(dim=0)) / count
    size = (first.norm(dim=1).amax() * second.norm(dim=1).amax()).clamp_min(torch.finfo(torch.float64).tiny)
    two, four = first.new_zeros(()), first.new_zeros(())
    for block in first.split(max(1, _BLOCK // len(second))):
        square = ((block @ second.T - mean) / size).square_()
        two, four = two + square.sum(), four + square.square_().sum()
    # A product of nothing but one number leaves rounding of the mean.
    if float(two / count) <= _NEGLIGIBLE**2 * float((mean / size).square()):
        return 0.0
    return float(four * count / two.square()) - 3.0


def _entries_kurtosis(x: Tensor) -> float:
    """Of all entries, in blocks; 0 of a constant."""
    flat = x.detach().reshape(-1)
    blocks = flat.split(_PIECE)
    largest = max(float(block.abs().amax()) for block in blocks)
    mean = float(torch.stack([block.double().sum() for block in blocks]).sum()) / len(flat)
    two = four = 0.0
    for block in blocks:
        square = ((block.double() - mean) / (largest or 1.0)).square_()
        two, four = two + float(square.sum()), four + float(square.square_().sum())
    two, four = two / len(flat), four / len(flat)
    return four / two**2 - 3.0 if two > _NEGLIGIBLE**2 else 0.0


def _kurtosis(columns: Tensor) -> Tensor:
    """Excess kurtosis of each column of [n, k]; 0 of constants."""
    return torch.cat([_column_kurtosis(part) for part in columns.split(max(1, _PIECE // len(columns)), dim=1)])


def _column_kurtosis(columns: Tensor) -> Tensor:
    largest = columns.abs().amax(dim=0)
    centred = columns - columns.mean(dim=0)
    centred = centred / largest.where(largest > 0, 1.0)
    two, four = centred.square().mean(dim=0), centred.pow(4).mean(dim=0)
    spread = two > _NEGLIGIBLE**2
    return torch.where(spread, four / two.where(spread, 1.0).square() - 3.0, 0.0)


def _leading(gram: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    """The largest singular values and their vectors as columns, of a matrix whose Gram matrix this is. It is overwritten."""
    # Column by column, as LAPACK works, and as its own result: it is decomposed where it lies, and torch makes no copy.
    squares, vectors = gram.new_empty(len(gram)), gram.T
    torch.linalg.eigh(vectors, out=(squares, vectors))
    kept = _kept(squares.clamp_min_(0).flip(0), energy)
    return squares[-kept:].sqrt(), vectors[:, -kept:]


def _kept(squares: Tensor, energy: float) -> int:
    """How many of the largest squares, given in falling order, hold that share of their sum."""
    reached = squares.cumsum(0) >= energy * squares.sum() * (1 - _NEGLIGIBLE)
    return min(len(squares), max(_LEAST, int(reached.to(torch.int).argmax()) + 1))


def _written(basis: Tensor, vectors: Tensor) -> Tensor:
    """The part of each column that lies in the basis: [k] in [0, 1]."""
    return (basis.T @ vectors).norm(dim=0).clamp(max=1.0)


def _robust(r: Tensor) -> Tensor:
    r = _finite("r", r)
    if r.dim() != 1 or not len(r):
        raise ValueError(f"r must be [L], got shape {list(r.shape)}")
    off = r - torch.quantile(r, 0.5)
    least = _NEGLIGIBLE * r.abs().amax()
    for spread in (_NORMAL * torch.quantile(off.abs(), 0.5), r.std(correction=0)):
        if bool(spread > least):
            return off / spread
    return torch.zeros_like(r)


def _finite(name: str, x: Tensor) -> Tensor:
    """In float64. Raises ValueError when a number is not finite."""
    x = x.detach().double()
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must hold finite numbers only")
    return x


def _check_energy(energy: float) -> None:
    if not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], got {energy}")


def _checked(layer: Mapping[str, Tensor], width: int, n_heads: int, n_kv_heads: int, head_dim: int) -> dict[str, Tensor]:
    """The weights, of the shapes that the heads ask for. In float64, and finite, each becomes where it is used."""
    if min(n_heads, n_kv_heads, head_dim) < 1 or n_heads % n_kv_heads:
        raise ValueError(f"n_heads={n_heads} must be a multiple of n_kv_heads={n_kv_heads}, and head_dim={head_dim} positive")
    missing = [name for name in NAMES if name not in layer]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; fused projections must be split first")
    gate = layer["gate_proj"]
    stack = tuple(gate.shape[:-2])
    inner = gate.shape[-2] if gate.dim() in (2, 3) else 0
    query, shared = n_heads * head_dim, n_kv_heads * head_dim
    shapes = {"q_proj": (query, width), "k_proj": (shared, width), "v_proj": (shared, width), "o_proj": (width, query)}
    shapes |= {"gate_proj": (*stack, inner, width), "up_proj": (*stack, inner, width), "down_proj": (*stack, width, inner)}
    for name, shape in shapes.items():
        if tuple(layer[name].shape) != shape or 0 in shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(layer[name].shape)}")
    return {name: layer[name] for name in NAMES}
