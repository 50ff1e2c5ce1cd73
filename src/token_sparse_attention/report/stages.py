"""What a benchmark says: where the operator's time goes, and the time to the first token.

Of `tsa bench far` it is the tables that the command prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from token_sparse_attention.benchmark.far_tables import FAR_TABLES
from token_sparse_attention.benchmark.record import Record
from token_sparse_attention.benchmark.runs import NoFigureError, Run, milliseconds, tokens
from token_sparse_attention.benchmark.tables import TABLES, number
from token_sparse_attention.report import charts
from token_sparse_attention.report.markup import Markup, folded, join, table, tag

STAGES = ("score", "select", "gather", "attend", "scatter")  # in the order in which they run
_COLUMNS = ("tokens", "kept", *STAGES, "sum", "whole", "dense", "speed-up")


@dataclass(frozen=True)
class Times:
    """Milliseconds of the operator at one length and kept share; what is missing is said why.

    Attributes:
        seq_len: S.
        kept: share of the tokens attended over.
        parts: of each of `STAGES`.
        whole: of all at once.
        dense: what it is compared with, by name and time.
        missing: why there are no times.
    """

    seq_len: int
    kept: float
    parts: tuple[float, ...] = ()
    whole: float = 0.0
    dense: tuple[str, float] = ("", 0.0)
    missing: str = ""


def stage_times(run: Run) -> list[Times]:
    """Return the times of every length and kept share whose stages were timed."""
    return [
        _times(run, seq_len, kept)
        for seq_len in run.lengths("ours/attend")
        for kept in run.shares("ours/attend")
        if run.find("ours/attend", seq_len, kept)
    ]


def _times(run: Run, seq_len: int, kept: float) -> Times:
    def stage(name: str) -> Record:
        # Scoring does not depend on the kept share, and is timed without one.
        share = None if name == "score" else kept
        return run.need(f"ours/{name}", seq_len, share, checked=False)

    try:
        whole, dense = run.need("ours/whole", seq_len, kept), run.dense(seq_len)
        return Times(
            seq_len,
            kept,
            parts=tuple(milliseconds(stage(name)) for name in STAGES),
            whole=milliseconds(whole),
            dense=(dense.name.removeprefix("dense/"), milliseconds(dense)),
        )
    except NoFigureError as error:
        return Times(seq_len, kept, missing=str(error))


def stages(run: Run) -> Markup:
    """Return what the run says about stages or about the time to the first token."""
    times = stage_times(run)
    prefill = list(TABLES["prefill"]([run]))[1:]
    far = list(_far_tables(run))
    if not times and not prefill and not far:
        return tag("p", "It holds neither stage times nor times to the first token.")
    content = [tag("p", _shape(run))]
    if times:
        content.append(
            tag(
                "p",
                "Each stage's time as a share of dense attention's at the same length, for each "
                "share of kept tokens. The mark is the whole operator, timed in one piece; the "
                "dashed line is dense.",
            )
        )
        names = [*((f"c{n}", name) for n, name in enumerate(STAGES)), ("m", "whole")]
        content.append(charts.key(names))
        content.append(tag("div", _figures(times), class_="grid"))
        rows = table("Milliseconds", _COLUMNS, map(_cells, times))
        content.append(folded("Table", rows) if len(times) > 12 else rows)
    if prefill:
        content.append(_first_token(prefill))
    return join(content, far)


def _shape(run: Run) -> str:
    records = run.result.records
    if not records:
        return "It holds no records."
    record = records[0]
    return (
        f"Batch {record.batch}, {record.num_heads} heads, {record.num_kv_heads} KV heads, "
        f"head size {record.head_dim}, {record.dtype}."
    )


def _figures(times: Sequence[Times]) -> Iterator[Markup]:
    for seq_len in dict.fromkeys(entry.seq_len for entry in times):
        chosen = [t for t in times if t.seq_len == seq_len and not t.missing]
        if chosen:
            kernel, dense = chosen[0].dense
            caption = f"{tokens(seq_len)} tokens; dense ({kernel}) {number(dense)} ms"
            chart = charts.stacked_bars(caption, [_bar(entry) for entry in chosen], STAGES)
            yield tag("figure", tag("figcaption", caption), chart)


def _bar(times: Times) -> charts.Bar:
    dense = times.dense[1]
    return charts.Bar(
        label=f"{times.kept:.0%}",
        parts=tuple((name, part / dense) for name, part in zip(STAGES, times.parts)),
        total=times.whole / dense,
        note=f"{number(times.whole)} ms, {dense / times.whole:.2f}x",
    )


def _cells(times: Times) -> tuple[str, ...]:
    at = (tokens(times.seq_len), f"{times.kept:.0%}")
    if times.missing:
        return (*at, times.missing, *[""] * (len(_COLUMNS) - 3))
    kernel, dense = times.dense
    return (
        *at,
        *map(number, times.parts),
        number(sum(times.parts)),
        number(times.whole),
        f"{kernel}: {number(dense)}",
        f"{dense / times.whole:.2f}x",
    )


def _far_tables(run: Run) -> Iterator[Markup]:
    """The documentation's tables; the first column names the run, bold is Markdown's."""
    titles = ("Far tokens: settings, milliseconds", "Far tokens: stages")
    for title, rows in zip(titles, FAR_TABLES.values()):
        (_, *header), *body = rows([run])
        if body:
            cells = ([cell.replace("**", "") for cell in row[1:]] for row in body)
            yield table(title, header, cells)


def _first_token(rows: Sequence[Sequence[str]]) -> Markup:
    """The documentation's table; its first column names the run, its bold is Markdown's."""
    header = ("tokens", "sparse layers", "kept", "first token, ms", "speed-up", "extra MiB")
    cells = ([cell.replace("**", "") for cell in row[1:]] for row in rows)
    return table("Time to the first token", header, cells)
