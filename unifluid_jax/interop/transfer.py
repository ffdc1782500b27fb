"""Moves weights between a foreign format and our leaves, checked leaf by leaf, a span at a time.

`fit` compares everything before anything is read, so that a file of another model costs nothing;
`bring_in` and `take_out` then copy. Each holds one span of at most one layer of one leaf, twice
(as it is read, and rearranged): see docs/conversion.md for the bound that follows.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from unifluid_jax.errors import UserError
from unifluid_jax.interop.rules import (
    PADDING_ROWS,
    Leaf,
    Plan,
    Span,
    Table,
    bind,
    split,
)
from unifluid_jax.interop.tensors import BFLOAT16, Sink, Source

FLOATS = (np.dtype(np.float32), BFLOAT16, np.dtype(np.float16))

# Elements that are looked at at once: a mask of a whole embedding table would be half its size.
_CHUNK = 1 << 24

Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A table, a source and our leaves that go together.

    Attributes:
        names: the source's own names, by canonical ones.
        fresh: our leaves that are to come from elsewhere, with the reason.
        notes: what is not as the rules have it, and allowed: padding, things left aside.
        resized: our leaves whose grid is to be resized.
    """

    table: Table
    plan: Plan
    source: Source
    leaves: Mapping[str, Leaf]
    names: Mapping[str, str]
    fresh: Mapping[str, str]
    notes: tuple[str, ...]
    resized: frozenset[str]

    @property
    def nbytes(self) -> int:
        """Bytes that `bring_in` reads."""
        return sum(
            self.source.leaves[self.names[name]].nbytes
            for name in self.plan.theirs
            if name in self.names
        )

    def dtypes(self) -> dict[str, np.dtype]:
        """The type that holds our leaf exactly, for each that is not fresh."""
        found: dict[str, np.dtype] = {}
        for piece in self.plan.pieces:
            name, path = self.names.get(piece.theirs.name), piece.ours.name
            if name is not None and path not in self.fresh:
                dtype = self.source.leaves[name].dtype
                if path in self.resized:
                    dtype = np.dtype(np.float32)
                found[path] = _wider(found.get(path, dtype), dtype)
        return found


def fit(
    tables: Sequence[Table],
    source: Source,
    leaves: Mapping[str, Leaf],
    *,
    sizes: Mapping[str, int] | None = None,
    allow: Sequence[str] = (),
    resizable: Sequence[str] = (),
) -> Fit:
    """The table that fits a source best, after a strict comparison.

    Args:
        tables: formats, or variants of one.
        leaves: shapes of our leaves; types do not matter.
        sizes: for `bind`.
        allow: regexes; a leaf of ours, or a foreign tensor, that one of them matches may be missing
            or left aside.
        resizable: our leaves, grids of positions, that may have another size.

    Raises:
        UserError: the source does not fit; names files, tensors and both shapes.
    """
    fits = []
    for table in tables:
        result = _compare(table, source, leaves, sizes or {}, allow, resizable)
        fits.append(result)
        if not result[1]:
            return result[0]
    result, problems = min(fits, key=lambda item: len(item[1]))
    if not any(name in result.names for name in result.plan.theirs):
        known = " or ".join(dict.fromkeys(table.name for table in tables))
        raise UserError(
            f"{source.path} holds nothing of a {known}: it has tensors like "
            f"{next(iter(source.leaves), 'none at all')}"
        )
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise UserError(
        f"{source.path} does not fit the config, read as {result.table.name}: "
        f"{'; '.join(problems[:3])}{more}"
    )


def _compare(
    table: Table,
    source: Source,
    leaves: Mapping[str, Leaf],
    sizes: Mapping[str, int],
    allow: Sequence[str],
    resizable: Sequence[str],
) -> tuple[Fit, list[str]]:
    names: dict[str, str] = {}
    problems: list[str] = []
    for name in source.leaves:
        canonical = table.canonical(name)
        if canonical in names:
            problems.append(f"{name} and {names[canonical]} are both {canonical}")
        names[canonical] = name
    rows = {canonical: (source.leaves[name].shape or (0,))[0] for canonical, name in names.items()}
    plan = bind(table, leaves, sizes, rows)
    fresh: dict[str, str] = {}
    notes: list[str] = []
    resized = set()

    def lacking(path: str, foreign: str, text: str) -> None:
        if _matches(allow, path) or _matches(allow, foreign):
            fresh[path] = text
        else:
            problems.append(text)

    for path in plan.uncovered:
        lacking(path, path, f"{path} has no place in it")
    for canonical, shape in plan.theirs.items():
        path = plan.source[canonical]
        if canonical not in names:
            ours = "" if path == canonical else f" ({path})"
            lacking(path, canonical, f"{canonical}{ours} is missing")
            continue
        name = names[canonical]
        leaf, where = source.leaves[name], source.where(name)
        if leaf.dtype not in FLOATS:
            problems.append(
                f"{name} in {where} is {leaf}: weights are float32, bfloat16 or float16"
            )
        ours = leaves[path].shape
        if canonical in plan.padded and leaf.shape[1:] == ours[1:] and leaf.shape:
            spare = leaf.shape[0] - ours[0]
            if abs(spare) > PADDING_ROWS:
                problems.append(
                    f"{name} in {where} has {leaf.shape[0]:,} rows, the config's vocabulary "
                    f"{ours[0]:,}"
                )
            elif spare > 0:
                notes.append(f"{path}: the last {spare:,} of {leaf.shape[0]:,} rows are cut off")
            elif spare < 0:
                notes.append(f"{path}: {-spare:,} rows of zeros after {leaf.shape[0]:,}")
        elif leaf.shape != shape:
            if path in resizable and len(leaf.shape) == len(shape):
                resized.add(path)
                notes.append(f"{path}: resized from {leaf} to {list(ours)}")
                continue
            turned = " (it looks transposed)" if leaf.shape == shape[::-1] else ""
            problems.append(f"{name} in {where} is {leaf}, wanted {list(shape)}{turned}")
    for canonical, name in names.items():
        if canonical in plan.theirs or canonical in table.tied:
            continue
        if table.ignores(canonical):
            continue
        if _matches(allow, canonical):
            notes.append(f"{name} is left aside")
        else:
            problems.append(f"{name} in {source.where(name)} is not part of this model")
    result = Fit(table, plan, source, leaves, names, fresh, tuple(notes), frozenset(resized))
    return result, problems


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def bring_in(
    fitted: Fit,
    sink: Sink,
    *,
    prefix: str = "",
    dtypes: Mapping[str, np.dtype] | None = None,
    resize: Callable[[np.ndarray, int], np.ndarray] | None = None,
    advance: Advance = lambda done: None,
) -> None:
    """Copies everything that the source has into our leaves.

    Args:
        sink: takes `prefix` + path.
        dtypes: of our leaves; by default those that hold the numbers exactly.
        resize: (positions [M, W], rows wanted) -> positions, for leaves in `fitted.resized`.
        advance: is told how many bytes of the source are done.

    Raises:
        UserError: a number is not finite, or becomes so in the wanted type; tied tensors differ.
    """
    dtypes = {**fitted.dtypes(), **(dtypes or {})}
    source = fitted.source
    for output, tied in fitted.table.tied.items():
        if output in fitted.names and tied in fitted.names:
            _check_tied(source, fitted.names[output], fitted.names[tied])
    for piece in fitted.plan.pieces:
        path, canonical = piece.ours.name, piece.theirs.name
        if canonical not in fitted.names:
            continue
        name = fitted.names[canonical]
        if path in fitted.fresh:
            continue
        where = f"{name} in {source.where(name)}"
        if path in fitted.resized:
            x = source.read(Span(name))
            _check_finite(x, where)
            wanted = fitted.leaves[path].shape[0]
            table = resize(piece.to_ours(x).reshape(-1, x.shape[-1]), wanted)
            sink.write(Span(prefix + path), cast(table, dtypes[path], where))
            advance(x.nbytes)
            continue
        x = source.read(dataclasses.replace(piece.theirs, name=name))
        _check_finite(x, where)
        span = dataclasses.replace(piece.ours, name=prefix + path)
        sink.write(span, cast(piece.to_ours(x), dtypes[path], where))
        advance(x.nbytes)
    for canonical in fitted.plan.padded:
        path = fitted.plan.source[canonical]
        if canonical not in fitted.names or path in fitted.fresh:
            continue
        leaf = fitted.leaves[path]
        filled = source.leaves[fitted.names[canonical]].shape[0]
        for start, stop in _row_spans(leaf, filled):
            zeros = np.zeros((stop - start, *leaf.shape[1:]), dtypes[path])
            sink.write(Span(prefix + path, (), (start, stop)), zeros)


def take_out(
    table: Table,
    source: Source,
    leaves: Mapping[str, Leaf],
    make_sink: Callable[[Mapping[str, Leaf]], Sink],
    *,
    prefix: str = "",
    sizes: Mapping[str, int] | None = None,
    vocabulary: int | None = None,
    dtype: np.dtype | None = None,
    spell: Sequence[tuple[str, str]] = (),
    advance: Advance = lambda done: None,
) -> dict[str, Leaf]:
    """Copies our leaves into a foreign format.

    Args:
        source: has `prefix` + path.
        leaves: of the part, by path.
        make_sink: opens the sink for the foreign tensors.
        vocabulary: rows of the embedding table there: cut, or filled with zeros.
        dtype: of all foreign tensors; by default each keeps its own.
        spell: (regex, replacement) pairs over canonical names, for those to be written.
        advance: is told how many bytes of the source are done.

    Returns:
        What was written.

    Raises:
        UserError: the format has no place for a leaf, or a number is not finite.
    """
    rows = {} if vocabulary is None else _vocabularies(table, leaves, sizes, vocabulary)
    plan = bind(table, leaves, sizes, rows)
    if plan.uncovered:
        raise UserError(
            f"{table.name} has no place for {plan.uncovered[0]}"
            f"{f' and {len(plan.uncovered) - 1} more' if len(plan.uncovered) > 1 else ''}: "
            "the config has what the format has not"
        )

    def spelled(name: str) -> str:
        for pattern, replacement in spell:
            name = re.sub(pattern, replacement, name)
        return name

    types: dict[str, np.dtype] = {}
    for piece in plan.pieces:
        own = source.leaves[prefix + piece.ours.name].dtype
        name = piece.theirs.name
        types[name] = dtype or _wider(types.get(name, own), own)
    written = {spelled(name): Leaf(shape, types[name]) for name, shape in plan.theirs.items()}
    with make_sink(written) as sink:
        for piece in plan.pieces:
            name = piece.theirs.name
            x = source.read(dataclasses.replace(piece.ours, name=prefix + piece.ours.name))
            where = f"{prefix}{piece.ours.name} in {source.path}"
            _check_finite(x, where)
            span = dataclasses.replace(piece.theirs, name=spelled(name))
            sink.write(span, cast(piece.to_theirs(x), types[name], where))
            advance(x.nbytes)
        for name in plan.padded:
            leaf = written[spelled(name)]
            filled = leaves[plan.source[name]].shape[0]
            for start, stop in _row_spans(leaf, filled):
                zeros = np.zeros((stop - start, *leaf.shape[1:]), leaf.dtype)
                sink.write(Span(spelled(name), (), (start, stop)), zeros)
    return written


def _vocabularies(
    table: Table, leaves: Mapping[str, Leaf], sizes: Mapping[str, int] | None, rows: int
) -> dict[str, int]:
    plan = bind(table, leaves, sizes)
    for name in plan.padded:
        ours = leaves[plan.source[name]].shape[0]
        if abs(ours - rows) > PADDING_ROWS:
            raise UserError(
                f"{plan.source[name]} has {ours:,} rows: {rows:,} would be another vocabulary"
            )
    return dict.fromkeys(plan.padded, rows)


def _row_spans(leaf: Leaf, filled: int) -> Iterator[tuple[int, int]]:
    """The rows of a table from `filled` on, in pieces that lie as `split` cuts it."""
    for _, rows in split(leaf):
        start, stop = rows or (0, leaf.shape[0])
        if stop > filled:
            yield max(start, filled), stop


def _wider(a: np.dtype, b: np.dtype) -> np.dtype:
    """The smallest type that holds both exactly; numpy knows none for bfloat16 and float16."""
    return np.dtype(jnp.promote_types(a, b))


def cast(x: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """The numbers in another type.

    Raises:
        UserError: one of them is too large for it.
    """
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    if dtype.itemsize <= x.dtype.itemsize:
        _check_finite(y, where, f"values that {dtype.name} does not: take another --dtype")
    return y


def _check_finite(
    x: np.ndarray, where: str, found: str = "values that are NaN or infinite"
) -> None:
    for i in range(0, x.size, _CHUNK) if x.flags.c_contiguous else [None]:
        part = x if i is None else x.reshape(-1)[i : i + _CHUNK]
        if part.dtype == BFLOAT16:
            # All bits of the exponent set; much faster than bfloat16's own isfinite.
            wrong = (np.ascontiguousarray(part).view(np.uint16) & 0x7F80) == 0x7F80
        else:
            wrong = ~np.isfinite(part)
        if wrong.any():
            raise UserError(f"{where} holds {np.count_nonzero(wrong):,} {found}")


def _check_tied(source: Source, output: str, tied: str) -> None:
    def digest(name: str) -> str:
        value = hashlib.sha256()
        for at, rows in split(source.leaves[name]):
            value.update(np.ascontiguousarray(source.read(Span(name, at, rows))).view(np.uint8))
        return value.hexdigest()

    if source.leaves[output] != source.leaves[tied] or digest(output) != digest(tied):
        raise UserError(
            f"{output} in {source.where(output)} differs from {tied}: Gemma's output embeddings "
            "are its input embeddings, and so are UniFluid's"
        )
