"""Replies from several processes: on every GPU, and several on each, since decoding waits."""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.record import Key
from token_sparse_attention.evaluation.samples import Sample

if TYPE_CHECKING:
    from token_sparse_attention.evaluation.evaluate import Arrival, Runner, Source

_FORESEEN = (UsageError, RuntimeError, OSError)  # whose message says enough


class Failure(NamedTuple):
    """Why a worker stopped."""

    message: str
    usage: bool


def several(runner: Runner, count: int, name: str, options: Mapping[str, Any]) -> Source:
    """Return what makes the replies of `runner` in several processes.

    Each loads the model for itself; the runner's own moves to the host's memory.

    Args:
        runner: what the workers do the same as.
        count: how many processes.
        name: of the model, as `run.load_model` takes it.
        options: further arguments of `run.load_model`.
    """
    runner.model.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    settings = {
        field.name: getattr(runner, field.name)
        for field in dataclasses.fields(runner)
        if field.name not in ("model", "tokenizer")
    }
    return partial(spread, partial(load_runner, name, dict(options), settings), count)


def load_runner(name: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> Runner:
    """Load a model and return its runner; a worker's first act."""
    import transformers

    from token_sparse_attention import run
    from token_sparse_attention.evaluation.evaluate import Runner

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Runner(*run.load_model(name, **options), **settings)


def spread(
    load: Callable[[], Runner],
    count: int,
    samples: Sequence[Sample],
    done: Collection[Key],
    report: Callable[[str], object],
) -> Generator[Arrival, None, None]:
    """Yield the replies of worker processes in the order of their arrival.

    Samples are dealt out in turns, so that each worker gets some of every length, and so are
    the GPUs. However this ends, no worker is left behind.

    Args:
        load: gives a worker its runner; a function that can be pickled.
        count: how many workers, at most as many as there are samples.
        samples: what to reply to, under each of the runner's configurations.
        done: keys of replies that are not wanted.
        report: is told what arrived.

    Raises:
        UsageError: if a worker met with bad input.
        RuntimeError: if a worker failed, or died.
    """
    count = min(count, len(samples))
    by_key = {(sample.task, sample.length, sample.index): sample for sample in samples}
    # Not forked: CUDA does not survive that.
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, Any] = {}
    try:
        for first in range(count):
            ours, theirs = context.Pipe()
            arguments = (load, set(done), first, count, theirs)
            workers[ours] = context.Process(target=_work, args=arguments, daemon=True)
            workers[ours].start()
            theirs.close()  # the worker has its own end, whose loss is its death
        report(f"starting {count} processes")
        # Not among the arguments: these are written before the next worker starts, which takes
        # as long as the worker's imports where they are many.
        for first, connection in enumerate(workers):
            with suppress(BrokenPipeError, ConnectionResetError):  # told below
                connection.send(samples[first::count])
        working = set(workers)
        while working:
            ready = wait(list(working))
            for connection in [one for one in working if one in ready]:
                message = _receive(connection, workers[connection])
                if message is None:
                    working.discard(connection)
                    continue
                key, name, reply = message
                sample = by_key[key]
                report(f"{sample.task} {sample.length or ''}, {name}")
                yield sample, name, reply
    finally:
        for connection, worker in workers.items():
            if worker.pid is not None:
                worker.terminate()
                worker.join()
            connection.close()


def _receive(connection: Connection, worker: Any) -> Any:
    try:
        message = connection.recv()
    except (EOFError, ConnectionResetError):
        worker.join()
        raise RuntimeError(
            f"a worker process died with exit code {worker.exitcode} before it was done"
        ) from None
    if isinstance(message, Failure):
        raise (UsageError if message.usage else RuntimeError)(message.message)
    return message


def _work(
    load: Callable[[], Runner],
    done: Collection[Key],
    number: int,
    count: int,
    connection: Connection,
) -> None:
    """Receive the samples; send every reply, then None; or a failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers itself
    torch.set_num_threads(max(torch.get_num_threads() // count, 1))
    if torch.cuda.is_available():  # a model on "cuda" goes to the current device
        torch.cuda.set_device(number % torch.cuda.device_count())
    try:
        samples = connection.recv()
        runner = load()
        from token_sparse_attention.evaluation.evaluate import replies

        for sample, name, reply in replies(runner, samples, done, lambda _: None, shared=True):
            connection.send(((sample.task, sample.length, sample.index), name, reply))
        connection.send(None)
    except BrokenPipeError:  # nobody is listening any more
        return
    except Exception as error:  # whatever it is, the parent must hear of it
        if not isinstance(error, _FORESEEN):
            traceback.print_exc()
        text = str(error) or type(error).__name__
        connection.send(Failure(text, isinstance(error, UsageError)))
