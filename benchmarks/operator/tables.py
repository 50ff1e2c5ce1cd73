"""Tables of what ``tsa bench op`` and ``tsa bench prefill`` measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.lookup import WALL_KINDS, kept_shares, main_kept, overhead_ms, speed_up
from benchmarks.markdown import NONE, Rows, Table, figure_or, number
from benchmarks.operator.targets import TARGETS, Target, crossover_ms, outcomes

from token_sparse_attention.benchmark.record import KERNEL_KINDS, Record
from token_sparse_attention.benchmark.runs import CHECK_FAILED, Run, milliseconds, tokens
from token_sparse_attention.config import TokenSelectionConfig

_SPREAD_FROM_MS = 1.0  # shorter times are mostly the clock's spread


def _ms(record: Record | None) -> str:
    if record is None or record.median_ms is None:
        return NONE
    return f"**{CHECK_FAILED}**" if record.passed is False else number(record.median_ms)


def _mib(record: Record | None) -> str:
    return (
        NONE if record is None or record.peak_extra_mib is None else number(record.peak_extra_mib)
    )


def _points(runs: Sequence[Run], *names: str) -> Iterator[tuple[Run, int]]:
    for run in runs:
        for seq_len in run.lengths(*names):
            yield run, seq_len


def _shares(runs: Sequence[Run], name: str) -> list[float]:
    return sorted({kept for run in runs for kept in kept_shares(run, name)}, reverse=True)


def runs_table(runs: Sequence[Run]) -> Rows:
    """Where and how each run was made."""
    yield "run", "device", "commit", "versions", "attention", "widest spread", "arguments"
    for run in runs:
        about, records = run.result.provenance, run.result.records
        versions = about.get("versions") or {}
        spreads = [
            ((r.high_ms or 0) - (r.low_ms or 0)) / r.median_ms
            for r in records
            if r.kind in KERNEL_KINDS and r.median_ms is not None
            if r.median_ms >= _SPREAD_FROM_MS
        ]
        yield (
            run.name,
            str(about.get("device")),
            f"`{str(about.get('commit'))[:12]}`",
            ", ".join(f"{name} {version}" for name, version in versions.items() if version),
            _shape(records[0]) if records else NONE,
            f"{max(spreads):.1%}" if spreads else NONE,
            f"`{_command(run.result.arguments)}`",
        )


def _shape(record: Record) -> str:
    return (
        f"batch {record.batch}, {record.num_heads} heads, {record.num_kv_heads} KV heads, "
        f"head size {record.head_dim}, {record.dtype}"
    )


def _command(arguments: Any) -> str:
    parts = [str(arguments.get("command", ""))]
    for name, value in arguments.items():
        if name != "command":
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            parts.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(parts)


def tflops(record: Record) -> float:
    """Return the rate of a dense causal attention: ``4 * S^2 / 2 * D * H`` operations."""
    work = 2 * record.seq_len**2 * record.head_dim * record.num_heads * record.batch
    return work / milliseconds(record) / 1e9


def _dense(runs: Sequence[Run]) -> Rows:
    names = list(dict.fromkeys(name for run in runs for name in run.names("dense/")))
    yield "run", "tokens", *(f"{name.removeprefix('dense/')}, ms (TFLOP/s)" for name in names)
    for run, seq_len in _points(runs, *names):
        cells = (figure_or(_with_rate, run, name, seq_len) for name in names)
        yield run.name, tokens(seq_len), *cells


def _with_rate(run: Run, name: str, seq_len: int) -> str:
    skipped = run.find(name, seq_len, kinds=("skipped",))
    if skipped is not None:
        return skipped.note.split(":")[0]
    record = run.need(name, seq_len)
    return f"{number(milliseconds(record))} ({tflops(record):.0f})"


def _stages(runs: Sequence[Run]) -> Rows:
    columns = ("score", "select", "gather", "scatter", "overhead", "attend")
    yield "run", "tokens", "kept", *columns, "overhead / attend", "whole", "whole - attend"
    for run, seq_len in _points(runs, "ours/attend"):
        kept = main_kept(run)
        attend = run.find("ours/attend", seq_len, kept)
        yield (
            run.name,
            tokens(seq_len),
            f"{kept:.0%}",
            _ms(run.find("ours/score", seq_len)),
            *(_ms(run.find(f"ours/{stage}", seq_len, kept)) for stage in columns[1:4]),
            figure_or(_overhead, run, seq_len, kept),
            _ms(attend),
            figure_or(_overhead_share, run, seq_len, kept),
            _ms(run.find("ours/whole", seq_len, kept)),
            figure_or(_rest, run, seq_len, kept),
        )


def _overhead(run: Run, seq_len: int, kept: float) -> str:
    return number(overhead_ms(run, seq_len, kept))


def _overhead_share(run: Run, seq_len: int, kept: float) -> str:
    attend = run.need("ours/attend", seq_len, kept, checked=False)
    return f"{overhead_ms(run, seq_len, kept) / milliseconds(attend):.1%}"


def _rest(run: Run, seq_len: int, kept: float) -> str:
    attend = run.need("ours/attend", seq_len, kept, checked=False)
    return number(milliseconds(run.need("ours/whole", seq_len, kept)) - milliseconds(attend))


def _whole_dense(runs: Sequence[Run]) -> Rows:
    shares = _shares(runs, "ours/whole")
    yield "run", "tokens", "dense", *(f"{kept:.0%} kept" for kept in shares)
    for run, seq_len in _points(runs, "ours/whole"):
        if run.find("ours/whole", seq_len, main_kept(run)) is None:
            continue
        cells = (figure_or(_against_dense, run, seq_len, kept) for kept in shares)
        yield run.name, tokens(seq_len), figure_or(_dense_ms, run, seq_len), *cells


def _dense_ms(run: Run, seq_len: int) -> str:
    base = run.dense(seq_len)
    return f"{base.name.removeprefix('dense/')}: {number(milliseconds(base))}"


def _against_dense(run: Run, seq_len: int, kept: float) -> str:
    ours = run.need("ours/whole", seq_len, kept)
    return f"{number(milliseconds(ours))} ({speed_up(run.dense(seq_len), ours):.2f}x)"


def _whole_eager(runs: Sequence[Run]) -> Rows:
    shares = _shares(runs, "eager/whole")
    yield "run", "tokens", *(f"{kept:.0%} kept: eager, ours" for kept in shares)
    for run, seq_len in _points(runs, "eager/whole"):
        cells = (figure_or(_against_eager, run, seq_len, kept) for kept in shares)
        yield run.name, tokens(seq_len), *cells


def _against_eager(run: Run, seq_len: int, kept: float) -> str:
    base = run.need("eager/whole", seq_len, kept, WALL_KINDS)
    ours = run.need("ours/whole", seq_len, kept, WALL_KINDS)
    times = (number(milliseconds(record)) for record in (base, ours))
    return f"{', '.join(times)} ({speed_up(base, ours):.2f}x)"


def _fallback(runs: Sequence[Run]) -> Rows:
    shares = _shares(runs, "ours/whole_window")
    header = ("floor", "window alone", *(f"extra, {kept:.0%} kept" for kept in shares))
    yield "run", "tokens", *header
    for run, seq_len in _points(runs, "ours/whole_window"):
        extra = (figure_or(_window_extra, run, seq_len, kept) for kept in shares)
        alone = _ms(run.find("ours/window", seq_len))
        yield run.name, tokens(seq_len), figure_or(_window_floor, run, seq_len), alone, *extra


def _window_floor(run: Run, seq_len: int) -> str:
    """The window's operations, ``4 * S * w * D * H``, at the rate of dense attention."""
    pairs = min(TokenSelectionConfig().sliding_window / seq_len, 0.5)
    return number(2 * pairs * milliseconds(run.dense(seq_len)))


def _window_extra(run: Run, seq_len: int, kept: float) -> str:
    windowed, zero = (
        run.need(name, seq_len, kept) for name in ("ours/whole_window", "ours/whole")
    )
    return number(milliseconds(windowed) - milliseconds(zero))


def _memory(runs: Sequence[Run]) -> Rows:
    columns = ("ours/whole", "ours/whole_window", "ours/unchunked", "eager/whole")
    header = ("ours", "with windowed fallback", "all heads at once", "eager composition")
    yield "run", "tokens", "kept", *header, "ours against all heads at once, time"
    for run, seq_len in _points(runs, "ours/whole"):
        kept = main_kept(run)
        peaks = [run.find(name, seq_len, kept, ("memory",)) for name in columns]
        if any(peaks):
            slower = figure_or(_chunking_cost, run, seq_len, kept)
            yield run.name, tokens(seq_len), f"{kept:.0%}", *map(_mib, peaks), slower


def _chunking_cost(run: Run, seq_len: int, kept: float) -> str:
    whole, unchunked = (run.need(f"ours/{n}", seq_len, kept) for n in ("whole", "unchunked"))
    return f"{milliseconds(whole) / milliseconds(unchunked) - 1:+.1%}"


def _first_call(runs: Sequence[Run]) -> Rows:
    yield "run", "tokens", "kept", "beyond a warm call, ms", "lowest", "highest", "calls"
    for run in runs:
        for record in run.result.records:
            if record.kind == "first_call":
                times = (record.median_ms, record.low_ms, record.high_ms)
                cells = (NONE if time is None else number(time) for time in times)
                kept = NONE if record.kept is None else f"{record.kept:.0%}"
                yield run.name, tokens(record.seq_len), kept, *cells, str(record.samples)


def _crossover(runs: Sequence[Run]) -> Rows:
    yield (
        *("run", "tokens", "drop_mass", "attended", "dense, ms", "slower than dense"),
        "slower by the host's clock",
    )
    for run in runs:
        for record in run.result.records:
            if record.name != "crossover/ours" or record.kind == _wall_kind(run):
                continue
            at = (record.seq_len, record.drop_mass)
            yield (
                run.name,
                tokens(record.seq_len),
                f"{record.drop_mass:g}",
                f"{record.kept:.1%}",
                figure_or(_crossover_dense, run, record.kind, *at),
                figure_or(_slower, run, record.kind, *at),
                figure_or(_slower, run, "eager", *at),
            )


def _wall_kind(run: Run) -> str | None:
    """Return the kind to leave out where device times were taken too."""
    kinds = {r.kind for r in run.result.records if r.name == "crossover/ours"}
    return "eager" if len(kinds) > 1 else None


def _crossover_dense(run: Run, kind: str, seq_len: int, drop_mass: float | None) -> str:
    return number(crossover_ms(run, kind, seq_len, drop_mass)[1])


def _slower(run: Run, kind: str, seq_len: int, drop_mass: float | None) -> str:
    over, base = crossover_ms(run, kind, seq_len, drop_mass)
    return f"{over * 1e3:+,.0f} us ({over / base:+.1%})"


def _prefill(runs: Sequence[Run]) -> Rows:
    yield "run", "tokens", "sparse layers", "kept", "first token, ms", "speed-up", "extra MiB"
    for run in runs:
        for record in run.result.records:
            if record.suite != "prefill":
                continue
            layers, kept = prefill_setting(record.name, record.kept)
            time = record.note.split(":")[0] if record.kind == "skipped" else _ms(record)
            yield (
                *(run.name, tokens(record.seq_len), "none" if layers == "dense" else layers),
                *(kept, time, figure_or(_prefill_speed_up, run, record), _mib(record)),
            )


def prefill_setting(name: str, kept: float | None) -> tuple[str, str]:
    """Return which layers of a prefill were sparse, and what they kept, in words."""
    setting, _, layers = name.rpartition("/")
    if setting.startswith("samples-"):
        return layers, f"{int(setting.removeprefix('samples-')):,} samples"
    return layers, NONE if kept is None else f"{kept:.0%}"


def _prefill_speed_up(run: Run, record: Record) -> str:
    base = run.need("dense", record.seq_len)
    ours = run.need(record.name, record.seq_len, record.kept)
    return f"{speed_up(base, ours):.2f}x"


def targets_table(targets: Sequence[Target], runs: Sequence[Run]) -> Rows:
    """Whether each aim was met."""
    yield "aim", "measured", "", "run"
    for aim, measured, verdict, name in outcomes(runs, targets):
        yield aim, measured, f"**{verdict}**", name


TABLES: dict[str, Table] = {
    "runs": runs_table,
    "targets": partial(targets_table, TARGETS),
    "dense": _dense,
    "stages": _stages,
    "whole-dense": _whole_dense,
    "whole-eager": _whole_eager,
    "fallback": _fallback,
    "memory": _memory,
    "first-call": _first_call,
    "crossover": _crossover,
    "prefill": _prefill,
}
