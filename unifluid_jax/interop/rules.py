"""Name tables: one list of rules says how a foreign format spells our parameters, both ways.

A `Table` is data. Each of its rules pairs one of our leaves with a foreign tensor:

    Rule("layers/q", "model.layers.{layer}.self_attn.q_proj.weight", "(H K) D -> D H K")
    Rule("layers/gate", "layer_{layer}/mlp/gating_einsum", "F D -> D F", at=0)
    Rule("encoder/down_{i}/resnet_{j}/norm1/scale", "encoder.down.{i}.block.{j}.norm1.weight")

- Our path is that of the part's own tree (`Functional.init` of a Gemma, a SigLIP, a VAE), names
  joined by "/"; a caller that has the part inside a bigger tree says so by `prefix`.
- Numbers in braces stand for indices. `{layer}` is special: our leaf holds all layers along its
  first axis, the foreign format has a tensor for each. With `stacked` both have them along the
  first axis. `{~i}` counts down where `{i}` counts up (LDM numbers the decoder's levels so).
- The form, in einops' notation from theirs to ours, rearranges one layer's numbers and never
  changes one; read backwards it is the way out. None means that both are laid out alike.
- `at` is the place of our tensor in a foreign one that holds several along its first axis (after
  the layers, if stacked): gate and up, keys and values.
- `rows` marks tables whose first axis may be padded: vocabularies.

`bind` makes of a table and the shapes of our leaves the list of `Piece`s to be copied, in either
direction, and the foreign tensors that there must be. A piece is at most one layer of one leaf;
what needs no rearrangement is cut into pieces of `PIECE` bytes.

RMSNorm scales need no arithmetic: all Gemma formats store w of `1 + w`, as we do.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import einops
import numpy as np

from unifluid_jax.errors import UserError

Shape = tuple[int, ...]

# Bytes that are moved at once where a tensor can be cut at will.
PIECE = 16 << 20

# Rows by which vocabularies of one model differ: padding, and PaliGemma's location and
# segmentation tokens (256,000 pieces; 256,128 official rows; 257,152 and 257,216 in PaliGemma).
PADDING_ROWS = 2048


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of our leaves and where a foreign format has it; see the module's text."""

    ours: str
    theirs: str
    form: str | None = None
    at: int | None = None
    stacked: bool = False
    rows: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A foreign format's names.

    Attributes:
        name: of the format, for messages.
        rules: one for every leaf that the format holds.
        spellings: (regex, replacement) pairs that turn other spellings of a foreign name into the
            one of the rules; all are applied in turn.
        ignored: regexes of foreign tensors (whole names, after `spellings`) that are not ours.
        tied: foreign tensors that must equal another one: output embeddings.
    """

    name: str
    rules: tuple[Rule, ...]
    spellings: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def canonical(self, name: str) -> str:
        """A foreign name as the rules spell it."""
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name)
        return name

    def ignores(self, name: str) -> bool:
        """Whether a foreign tensor, by its canonical name, is known to be none of ours."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def prefixed(self, ours: str = "", theirs: str = "") -> tuple[Rule, ...]:
        """The rules with both sides inside something bigger."""
        return tuple(
            dataclasses.replace(rule, ours=ours + rule.ours, theirs=theirs + rule.theirs)
            for rule in self.rules
        )


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Shape and type of a tensor."""

    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Span:
    """A contiguous part of a tensor: `tensor[at][start:stop]`; all of `tensor[at]` without rows."""

    name: str
    at: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """The same numbers on both sides."""

    ours: Span
    theirs: Span
    form: str | None
    sizes: tuple[tuple[str, int], ...]

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        """Their layout to ours; a view."""
        if self.form is None:
            return x
        theirs, ours = self.form.split("->")
        return einops.rearrange(x, f"{theirs}->{ours}", **_needed(theirs, self.sizes))

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """Our layout to theirs; a view."""
        if self.form is None:
            return x
        theirs, ours = self.form.split("->")
        return einops.rearrange(x, f"{ours}->{theirs}", **_needed(ours, self.sizes))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a table makes of a tree.

    Attributes:
        pieces: everything to be copied, foreign tensor by foreign tensor.
        theirs: shapes of the foreign tensors, by canonical name.
        source: our leaf that a foreign tensor is (or begins with), for messages.
        padded: foreign names of vocabularies, whose first axis may have another length.
        uncovered: our leaves that the format does not hold.
    """

    pieces: tuple[Piece, ...]
    theirs: Mapping[str, Shape]
    source: Mapping[str, str]
    padded: frozenset[str]
    uncovered: tuple[str, ...]


def bind(
    table: Table,
    leaves: Mapping[str, Leaf],
    sizes: Mapping[str, int] | None = None,
    rows: Mapping[str, int] | None = None,
) -> Plan:
    """Applies a table to our leaves.

    Args:
        leaves: shapes and types of our tree, or of a part of it, by path.
        sizes: letters of the forms that shapes alone do not tell, like a patch's height.
        rows: lengths of the first axis of vocabularies on their side, by canonical name; as many
            as ours by default.

    Raises:
        ValueError: two rules fit one leaf: a bug of the table.
    """
    rows = rows or {}
    pieces: list[Piece] = []
    theirs: dict[str, list[int]] = {}
    source: dict[str, str] = {}
    padded, uncovered = set(), []
    levels = _levels(leaves)
    for path, leaf in leaves.items():
        found = [
            (rule, match) for rule in table.rules if (match := _pattern(rule.ours).fullmatch(path))
        ]
        if not found:
            uncovered.append(path)
            continue
        if len(found) > 1:
            raise ValueError(f"{table.name}: {len(found)} rules for {path}")
        rule, match = found[0]
        numbers = {key: int(value) for key, value in match.groupdict().items()}
        numbers |= {f"~{key}": levels.get(path.split("/")[0], 0) - n for key, n in numbers.items()}
        for name, shape, new in _pieces(rule, path, leaf, numbers, dict(sizes or {}), rows):
            if name in theirs and rule.at is not None:
                # Tensors of several: as long as the highest place says.
                axis = 1 if rule.stacked else 0
                theirs[name][axis] = max(theirs[name][axis], shape[axis])
            else:
                theirs[name] = list(shape)
                source[name] = path
            pieces.extend(new)
            if rule.rows:
                padded.add(name)
    order = {name: i for i, name in enumerate(theirs)}
    pieces.sort(key=lambda piece: order[piece.theirs.name])
    shapes = {name: tuple(shape) for name, shape in theirs.items()}
    return Plan(tuple(pieces), shapes, source, frozenset(padded), tuple(uncovered))


def split(
    leaf: Leaf, stacked: bool = False
) -> list[tuple[tuple[int, ...], tuple[int, int] | None]]:
    """Cuts a tensor into spans, (at, rows), of about `PIECE` bytes; one a layer at least.

    Args:
        stacked: the first axis is one of layers.
    """
    if stacked:
        inner = Leaf(leaf.shape[1:], leaf.dtype)
        return [((i, *at), r) for i in range(leaf.shape[0]) for at, r in split(inner)]
    if not leaf.shape or leaf.nbytes <= PIECE:
        return [((), None)]
    step = even_step(leaf.shape[0], leaf.nbytes // leaf.shape[0])
    return [
        ((), (start, min(start + step, leaf.shape[0]))) for start in range(0, leaf.shape[0], step)
    ]


def even_step(length: int, row: int) -> int:
    """Rows to a piece: pieces of at most `PIECE` bytes, or one row, and nearly of one size."""
    fits = max(1, PIECE // max(1, row))
    return -(-length // -(-length // fits))


def _pieces(
    rule: Rule,
    path: str,
    leaf: Leaf,
    numbers: dict[str, int],
    sizes: dict[str, int],
    rows: Mapping[str, int],
) -> Iterator[tuple[str, Shape, list[Piece]]]:
    """Foreign name, foreign shape and pieces of a leaf, one item for each foreign tensor."""
    each = "{layer}" in rule.theirs
    depth = leaf.shape[0] if each or rule.stacked else 0
    inner = Leaf(leaf.shape[1:] if depth else leaf.shape, leaf.dtype)
    sizes = _letters(rule.form, inner.shape, sizes, path)
    shape = _foreign_shape(rule.form, sizes, inner.shape)
    place = () if rule.at is None else (rule.at,)

    def spans(name: str, ours_at: tuple[int, ...], theirs_at: tuple[int, ...]) -> list[Piece]:
        cut = [((), None)] if rule.form is not None else split(inner)
        common = min(inner.shape[0], rows.get(name, inner.shape[0])) if rule.rows else None
        new = []
        for at, r in cut:
            if common is not None:
                start, stop = r or (0, inner.shape[0])
                if start >= common:
                    continue
                r = (start, min(stop, common))
            new.append(
                Piece(
                    Span(path, (*ours_at, *at), r),
                    Span(name, (*theirs_at, *at), r),
                    rule.form,
                    tuple(sizes.items()),
                )
            )
        return new

    if rule.rows:
        name = _fill(rule.theirs, numbers)
        yield name, (rows.get(name, shape[0]), *shape[1:]), spans(name, (), ())
    elif each:
        for layer in range(depth):
            name = _fill(rule.theirs, numbers | {"layer": layer})
            full = (place[0] + 1, *shape) if place else shape
            yield name, full, spans(name, (layer,), place)
    else:
        name = _fill(rule.theirs, numbers)
        full = (place[0] + 1, *shape) if place else shape
        if rule.stacked:
            new = [piece for i in range(depth) for piece in spans(name, (i,), (i, *place))]
            yield name, (depth, *full), new
        else:
            yield name, full, spans(name, (), place)


def _pattern(template: str) -> re.Pattern[str]:
    """The regex of a path with numbers in braces."""
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(f"(?P<{part}>\\d+)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    )


def _fill(template: str, numbers: Mapping[str, int]) -> str:
    return re.sub(r"\{(~?\w+)\}", lambda match: str(numbers[match[1]]), template)


def _levels(leaves: Mapping[str, Leaf]) -> dict[str, int]:
    """The highest level of an autoencoder's halves: what `{~i}` counts down from."""
    levels: dict[str, int] = {}
    for path in leaves:
        for half, level in re.findall(r"(?:^|/)(encoder|decoder)/(?:down|up)_(\d+)/", path):
            levels[half] = max(levels.get(half, 0), int(level))
    return levels


def _letters(form: str | None, shape: Shape, sizes: dict[str, int], path: str) -> dict[str, int]:
    """Sizes of the letters of a form, from our shape."""
    if form is None:
        return {}
    ours = _axes(form.split("->")[1])
    if len(ours) != len(shape):
        raise UserError(f"{path} has shape {list(shape)}, and the table wants {len(ours)} axes")
    known = {letter: sizes[letter] for group in ours for letter in group if letter in sizes}
    for group, size in zip(ours, shape, strict=True):
        if len(group) == 1 and not group[0].isdigit():
            known[group[0]] = size
    return known


def _foreign_shape(form: str | None, sizes: Mapping[str, int], shape: Shape) -> Shape:
    if form is None:
        return shape
    groups = _axes(form.split("->")[0])
    return tuple(math.prod(int(x) if x.isdigit() else sizes[x] for x in group) for group in groups)


def _axes(side: str) -> list[list[str]]:
    """The axes of one side of a form, each a list of letters: "(H K) D" -> [[H, K], [D]]."""
    return [
        (grouped or single).split() for grouped, single in re.findall(r"\(([^)]*)\)|(\w+)", side)
    ]


def _needed(side: str, sizes: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """The sizes that einops must be told: those of letters in groups."""
    grouped = {x for group in _axes(side) if len(group) > 1 for x in group}
    return {letter: size for letter, size in sizes if letter in grouped}
