"""What lm-evaluation-harness does here: it makes prompts, and it scores replies.

Only this module and `integrations.lm_eval` import it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.metadata
import io
import math
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.samples import Sample, SampleSet, pack_doc

# The tasks of RULER whose texts are made up on the spot, so that nothing is downloaded.
LOCAL_RULER = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
)
# The function of each RULER module that makes one length's samples; all take `num_samples`.
_GENERATORS = {
    "niah_utils": "generate_samples",
    "vt_utils": "sys_vartrack_w_noise_random",
    "cwe_utils": "sys_word_pair_random",
    "fwe_utils": "sys_kwext",
    "qa_utils": "generate_samples",
}
_LM_EVAL_COUNT = 500  # what lm-eval asks these functions for, whatever its own limit
_DEFAULT_MAX_NEW_TOKENS = 256  # lm-eval's, for tasks that name none
_FEWSHOT_SEED = 1234  # lm-eval's own
_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
_SHORTEST_RULER = 1024  # tokens; below, some of lm-eval's generators try for ever
_TOLERANCE = 1e-6  # how far rounding may carry a score beyond 1

Report = Callable[[str], object]


def installed_version() -> str | None:
    """Return the version of lm-eval, None if it is not installed."""
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def prepare(
    tasks: Sequence[str],
    lengths: Sequence[int],
    limit: int,
    *,
    tokenizer: Any,
    tokenizer_name: str,
    seed: int = 0,
    chat_template: bool = False,
    report: Report = lambda _: None,
) -> SampleSet:
    """Make the prompts of lm-eval's tasks.

    RULER's samples depend on the task, the length, the seed and the tokenizer, not on what
    else is asked for; with a larger limit, the first ones stay the same. They come from
    lm-eval's generators, but are not those that lm-eval itself would draw: it seeds once for
    all tasks and lengths together.

    Args:
        tasks: lm-eval's names of tasks, groups or tags; ``"ruler"`` means `LOCAL_RULER`.
        lengths: for tasks that are made to a length.
        limit: samples per task and length, or per task where it has no lengths.
        tokenizer: counts the lengths and renders chats.
        tokenizer_name: what to call it.
        seed: any number; another one draws other samples, where they are drawn.
        chat_template: whether prompts are turned into chats, as lm-eval's
            ``--apply_chat_template`` does.
        report: is told what is being made.

    Raises:
        UsageError: if lm-eval or something a task needs is missing, a name is unknown, or a
            task asks for something else than text.
    """
    version = _require()
    manager = _manager(tasks, list(lengths), tokenizer_name)
    samples: list[Sample] = []
    versions: dict[str, Any] = {}
    for name in _leaves(manager, tasks):
        report(f"preparing {name}")
        task = _load_for_prompts(manager, name, limit, seed, tokenizer, report)
        with _quiet():
            made = _task_samples(name, task, limit, tokenizer if chat_template else None)
        samples += made
        versions[name] = task.VERSION
    samples.sort(key=lambda sample: (sample.length, sample.index))
    return SampleSet(
        lm_eval=version,
        tokenizer=tokenizer_name,
        chat_template=chat_template,
        seed=seed,
        lengths=list(lengths),
        limit=limit,
        tasks=versions,
        samples=samples,
    )


class Scorer:
    """Scores replies with lm-eval's tasks, without loading their data sets again.

    Raises:
        UsageError: if lm-eval or something a task needs is missing, or if another version of
            lm-eval made the samples.
    """

    def __init__(self, samples: SampleSet) -> None:
        version = _require()
        if version != samples.lm_eval:
            raise UsageError(
                f"the samples must be scored by lm-eval {samples.lm_eval}, which made them; "
                f"{version} is installed"
            )
        manager = _manager(list(samples.tasks), samples.lengths, samples.tokenizer)
        docs = {sample.task: sample for sample in reversed(samples.samples)}
        self._tasks = {
            name: load_task(manager, name, [sample.unpack_doc()]) for name, sample in docs.items()
        }

    def score(self, sample: Sample, reply: str) -> float:
        """Return the score of a reply, from 0 to 1.

        The reply goes through the task's first filter, then its ``process_results``. Of
        several metrics the one of the sample's length counts (RULER), else ``"score"``
        (LongBench, InfiniteBench), else the first that the task lists.

        Raises:
            UsageError: if that is no number from 0 to 1.
        """
        task, doc = self._tasks[sample.task], sample.unpack_doc()
        instance = importlib.import_module("lm_eval.api.instance").Instance(
            request_type="generate_until",
            doc=doc,
            arguments=(sample.prompt, {}),
            idx=0,
            metadata=(sample.task, sample.index, 1),
        )
        instance.resps = [reply]
        chosen = task._filters[0]
        with _quiet():
            chosen.apply([instance])
            metrics = task.process_results(doc, [instance.filtered_resps[chosen.name]])
        return _one_number(sample, metrics, task.aggregation())


def load_task(manager: Any, name: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return an lm-eval task that holds `rows` in place of its data set."""
    data = importlib.import_module("datasets").Dataset.from_list([dict(row) for row in rows])
    config = manager.task_index[name].cfg
    splits = {config[split]: data for split in _SPLITS if config.get(split)}
    # The rows are what a task's own processing made of its data.
    return _load(manager, name, custom_dataset=lambda **_: splits, process_docs=None)


def _require() -> str:
    version = installed_version()
    if version is None:
        raise UsageError("this needs lm-eval: pip install 'token-sparse-attention[eval]'")
    return version


def _manager(tasks: Sequence[str], lengths: Sequence[int], tokenizer_name: str) -> Any:
    """Return lm-eval's task manager, over no more folders than the names call for.

    Reading all of lm-eval's tasks takes 10 s or more.
    """
    with _quiet():
        tasks_module = importlib.import_module("lm_eval.tasks")
    root = Path(str(tasks_module.__file__)).parent
    metadata = {"max_seq_lengths": list(lengths), "tokenizer": tokenizer_name}
    families = {"ruler" if name in LOCAL_RULER else name.split("_")[0] for name in tasks}
    folders = [root / family for family in sorted(families) if (root / family).is_dir()]
    manager: Any = None
    with _quiet():
        if folders:
            manager = tasks_module.TaskManager(
                include_path=folders, include_defaults=False, metadata=metadata
            )
        if manager is None or any(name not in manager.task_index for name in tasks):
            manager = tasks_module.TaskManager(metadata=metadata)
    for name in tasks:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UsageError(f"--tasks: lm-eval has no task {name!r}{hint}")
    return manager


def _leaves(manager: Any, names: Sequence[str]) -> list[str]:
    """Return the tasks that groups and tags stand for, each once."""
    found: dict[str, None] = {}
    for name in names:
        entry = manager.task_index[name]
        kind = entry.kind.name
        if name == "ruler":
            children: list[Any] = list(LOCAL_RULER)
        elif kind == "TAG":
            children = sorted(entry.tags)
        elif kind == "GROUP":
            children = entry.cfg["task"]
        else:
            found[name] = None
            continue
        if not all(isinstance(child, str) for child in children):
            raise UsageError(
                f"--tasks: the group {name!r} defines tasks of its own; name its tasks instead"
            )
        found.update(dict.fromkeys(_leaves(manager, children)))
    return list(found)


def _load(manager: Any, name: str, **changes: Any) -> Any:
    """Return one of lm-eval's tasks with some of its config changed."""
    # Only as a member of a group can a registered task be given changes.
    alone = {"group": "evaluation", "task": [{"task": name, **changes}]}
    try:
        with _quiet(), _randomness_put_back():
            task = manager.load([alone])["tasks"][name]
    except ImportError as error:
        raise UsageError(f"the task {name} needs what is not installed: {error}") from error
    except (OSError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        raise UsageError(f"the task {name} cannot be loaded: {error}") from error
    if task.OUTPUT_TYPE != "generate_until":
        raise UsageError(
            f"--tasks: {name} must ask for text (generate_until), but asks for {task.OUTPUT_TYPE}"
        )
    return task


def _load_for_prompts(
    manager: Any, name: str, limit: int, seed: int, tokenizer: Any, report: Report
) -> Any:
    source = Path(str(manager.task_index[name].cfg.get("custom_dataset", "")))
    module_name, _, function = source.name.rpartition(".")
    if source.parent.name != "ruler" or module_name not in _GENERATORS:
        return _load(manager, name)
    if min(manager.metadata["max_seq_lengths"]) < _SHORTEST_RULER:
        raise UsageError(f"--lengths must be at least {_SHORTEST_RULER} for {name}")
    try:
        with _quiet():
            module: Any = importlib.import_module(f"lm_eval.tasks.ruler.{module_name}")
    except ImportError as error:
        raise UsageError(f"the task {name} needs what is not installed: {error}") from error

    def made(**arguments: Any) -> Any:
        with _fewer_samples(module, _GENERATORS[module_name], limit, seed, tokenizer, report):
            return getattr(module, function)(**arguments)

    return _load(manager, name, custom_dataset=made)


@contextlib.contextmanager
def _fewer_samples(
    module: Any, generator: str, limit: int, seed: int, tokenizer: Any, report: Report
) -> Iterator[None]:
    """Make a RULER module draw `limit` samples per length, each length by its own seed.

    lm-eval writes the number 500 into the calls, and draws from Python's and numpy's global
    generators.
    """
    import numpy as np

    original, get_tokenizer = getattr(module, generator), module.get_tokenizer

    def fewer(*arguments: Any, **named: Any) -> Any:
        named = {
            name: limit if name == "num_samples" and value == _LM_EVAL_COUNT else value
            for name, value in {"num_samples": _LM_EVAL_COUNT, **named}.items()
        }
        drawn = {name: value for name, value in named.items() if isinstance(value, (str, int))}
        drawn = {name: value for name, value in drawn.items() if name != "num_samples"}
        text = f"{seed} {module.__name__} {sorted(drawn.items())}"
        random.seed(text)
        np.random.seed(zlib.crc32(text.encode()))
        if hasattr(module, "RNG"):  # the common words task shuffles by one of its own
            module.RNG.seed(text)
        report(f"preparing {module.__name__.rpartition('.')[2]}, {named['max_seq_length']} tokens")
        return original(*arguments, **named)

    setattr(module, generator, fewer)
    # lm-eval would load it again, and let code that comes with it run.
    module.get_tokenizer = lambda *_, **__: tokenizer
    try:
        yield
    finally:
        setattr(module, generator, original)
        module.get_tokenizer = get_tokenizer


def _task_samples(name: str, task: Any, limit: int, chat_tokenizer: Any) -> list[Sample]:
    def as_chat(history: Any, add_generation_prompt: bool = True) -> str:
        text: str = chat_tokenizer.apply_chat_template(
            history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    has_lengths = "max_length" in task.eval_docs[0]
    task.build_all_requests(
        limit=None if has_lengths else limit,
        apply_chat_template=chat_tokenizer is not None,
        chat_template=None if chat_tokenizer is None else as_chat,
    )
    counts: dict[int, int] = {}
    samples = []
    for instance in task.instances:
        prompt, arguments = instance.args[:2]
        length = instance.doc["max_length"] if has_lengths else 0
        index = counts[length] = counts.get(length, -1) + 1
        if has_lengths and not instance.doc.get("outputs", True):
            raise UsageError(f"--lengths: {name} cannot be made as short as {length} tokens")
        until = arguments.get("until") or []
        samples.append(
            Sample(
                task=name,
                length=length,
                index=index,
                prompt=prompt,
                until=[until] if isinstance(until, str) else list(until),
                max_new_tokens=_max_new_tokens(arguments),
                doc=pack_doc(instance.doc, prompt),
            )
        )
    return samples


def _max_new_tokens(arguments: Mapping[str, Any]) -> int:
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        if arguments.get(name) is not None:
            return int(arguments[name])
    return _DEFAULT_MAX_NEW_TOKENS


def _one_number(sample: Sample, metrics: Mapping[str, Any], listed: Mapping[str, Any]) -> float:
    wanted = [str(sample.length), "score", *listed, *metrics]
    name = next(name for name in wanted if name in metrics)
    try:
        value = float(metrics[name])
    except (TypeError, ValueError):
        value = math.nan
    if not -_TOLERANCE <= value <= 1 + _TOLERANCE:
        raise UsageError(
            f"--tasks: the metric {name!r} of {sample.task} must be a number from 0 to 1 for "
            f"each reply, got {metrics[name]!r}"
        )
    return min(max(value, 0.0), 1.0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's prints and progress bars off both streams; errors still come through."""
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        yield


@contextlib.contextmanager
def _randomness_put_back() -> Iterator[None]:
    """Leave Python's and numpy's global generators as they were."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
