"""How long the prompts of a step are: vLLM's model runner knows, and tells no attention backend.

Only a prompt's own last queries attend to every key, and vLLM gives a backend a chunk's length
alone. So the plugin notes in each worker which runner runs a step, and reads the lengths from
its batch. Both of vLLM's runners are known; one without what is read here stops the start.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, NoReturn

_WATCHED = "_token_sparse_watched"


class _Batch(NamedTuple):
    """The requests of the step that runs.

    Attributes:
        runner: vLLM's model runner.
        rows: its batch, None where it is an attribute of the runner.
    """

    runner: Any
    rows: Any = None


_running: list[_Batch] = []  # at most one: a worker runs a step at a time


def watch_runner(vllm_config: Any) -> None:
    """Make prompt lengths known in this process.

    Raises:
        RuntimeError: if vLLM's model runner has no function that the plugin knows.
    """
    if getattr(vllm_config, "use_v2_model_runner", False):
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Second

        _watch(Second, "execute_model", functools.partial(_during_step, noting=False))
        _watch(Second, "prepare_attn", _noting_rows)
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner as First

        _watch(First, "execute_model", functools.partial(_during_step, noting=True))


def prompt_lengths(num_rows: int) -> list[int] | None:
    """Return the prompt's length of each request of the step, in the rows' order.

    Args:
        num_rows: how many requests the step's metadata has, padding included.

    Returns:
        As many lengths as there are requests; None outside of a step, as in vLLM's own warm-up,
        and where the metadata is that of a part of the step.

    Raises:
        RuntimeError: if vLLM keeps them elsewhere than the plugin knows.
    """
    if not _running:
        return None
    runner, batch = _running[-1]
    try:
        if batch is None:
            rows = runner.input_batch.num_reqs
            lengths = runner.input_batch.num_prompt_tokens[:rows]
        else:
            rows = batch.num_reqs
            lengths = runner.req_states.prompt_len.np[batch.idx_mapping_np[:rows]]
    except AttributeError as error:
        _refuse(type(runner), str(error))
    return None if num_rows < rows else [int(length) for length in lengths]


def _watch(runner: type, name: str, wrap: Any) -> None:
    function = getattr(runner, name, None)
    if function is None:
        _refuse(runner, f"it has no {name}")
    if not hasattr(function, _WATCHED):
        watched = functools.wraps(function)(wrap(function))
        setattr(watched, _WATCHED, True)
        setattr(runner, name, watched)


def _during_step(function: Any, *, noting: bool) -> Any:
    """Note the runner as that of a step, if its batch is known by then; forget it afterwards."""

    def execute_model(runner: Any, *arguments: Any, **named: Any) -> Any:
        _running[:] = [_Batch(runner)] if noting else []
        try:
            return function(runner, *arguments, **named)
        finally:
            _running.clear()

    return execute_model


def _noting_rows(function: Any) -> Any:
    def prepare_attn(runner: Any, batch: Any, *arguments: Any, **named: Any) -> Any:
        _running[:] = [_Batch(runner, batch)]
        return function(runner, batch, *arguments, **named)

    return prepare_attn


def _refuse(runner: type, why: str) -> NoReturn:
    from vllm import __version__

    raise RuntimeError(
        f"vLLM {__version__} does not say how long prompts are, which token sparse attention "
        f"needs: {runner.__module__}.{runner.__qualname__}: {why}"
    )
