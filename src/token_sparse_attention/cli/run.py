"""``tsa run``: one question about one document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from token_sparse_attention.cli.command import Command, output, print_json, working
from token_sparse_attention.cli.model import (
    ModelOptions,
    PromptOptions,
    check_length,
    require_transformers,
)
from token_sparse_attention.errors import running, within_memory
from token_sparse_attention.options import Tokens
from token_sparse_attention.settings import LEADING_PATTERN, Settings, settings_or_default

if TYPE_CHECKING:
    from rich.table import Table

    from token_sparse_attention.integrations.record import LayerRecord
    from token_sparse_attention.run import Answer


_BARS = "▁▂▃▄▅▆▇█"
_MOST_BARS = 32


@dataclass(frozen=True, kw_only=True)
class Run(Command):
    """Answer a question about a long document, prefilling sparsely.

    Attributes:
        compare: also answer densely, and show both times
        max_new_tokens: most tokens of the answer
    """

    name: ClassVar[str] = "run"
    example: ClassVar[str] = (
        'tsa run --prompt-file report.txt --question "Who signed the contract?" --compare\n'
        "tsa run meta-llama/Llama-3.1-8B-Instruct --prompt-file book.txt --config profile.json"
    )
    prompt: PromptOptions
    compare: bool = False
    max_new_tokens: Tokens = 64
    model: ModelOptions

    def run(self) -> bool:
        """Answer, and show the answers, times and layers."""
        self.model.check()
        document = self.prompt.read()
        require_transformers()
        from token_sparse_attention import run

        name, backend = self.model.path, self.prompt.attention_backend
        config, source = settings_or_default(self.prompt.config, name)
        with working(f"loading {name}") as status:
            model, tokenizer = self.model.load()
            ids = run.encode_prompt(tokenizer, document, self.prompt.question)
            check_length(model, ids, self.max_new_tokens)
            answers: dict[str, Answer] = {}
            paths: dict[str, Settings | None] = {"sparse": config}
            for path, settings in (paths | ({"dense": None} if self.compare else {})).items():
                status.update(f"{path}: reading {ids.shape[1]:,} tokens")
                with running(name, f"run {path}"), within_memory(ids.shape[1], path):
                    if not answers:
                        self._warm_up(model, tokenizer, ids, config)
                    answers[path] = run.answer(
                        model,
                        tokenizer,
                        ids,
                        settings,
                        max_new_tokens=self.max_new_tokens,
                        impl=self.model.impl,
                        attention_backend=backend,
                    )
        note = _note(answers, backend)
        if self.json:
            from token_sparse_attention.info import provenance

            about = {
                "model": name,
                "dtype": str(model.dtype).removeprefix("torch."),
                "config": json.loads(config.to_json()),
                "config_source": source,
                "attention_backend": backend,
                **provenance(str(model.device)),
                "note": note,
            }
            print_json(about | {path: answer.to_dict() for path, answer in answers.items()})
        else:
            _show(name, str(model.device), source, answers, note)
        return True

    def _warm_up(self, model: Any, tokenizer: Any, ids: Any, config: Settings) -> None:
        from token_sparse_attention import run

        on_gpu = model.device.type == "cuda"  # on a CPU nothing is compiled
        run.warm_up(
            model,
            tokenizer,
            ids,
            config if on_gpu else None,
            impl=self.model.impl,
            attention_backend=self.prompt.attention_backend,
            whole=on_gpu and self.compare,
        )


def _show(
    name: str, device: str, source: str, answers: Mapping[str, Answer], note: str | None
) -> None:
    from rich.markup import escape

    console = output()
    sparse = answers["sparse"]
    tokens = f"{sparse.prompt_tokens:,} prompt tokens"
    about = f"[bold]{escape(name)}[/] on {device}, {tokens}, settings: {escape(source)}"
    console.print(about, soft_wrap=True)
    if sparse.report:
        console.print(layer_table(sparse.report.last_prefill()))
    for path, answer in answers.items():
        console.print(
            f"[bold]{path}[/]: first token after {answer.time_to_first_token:.3f} s, "
            f"{answer.new_tokens} tokens after {answer.total_time:.3f} s (one run)"
        )
        console.print(answer.text, markup=False, highlight=False, soft_wrap=True)
    if note is not None:
        console.print(f"[yellow]note[/]: {escape(note)}", highlight=False)
    if "dense" in answers:
        ratio = answers["dense"].time_to_first_token / sparse.time_to_first_token
        console.print(f"time to first token, dense over sparse: {ratio:.2f} (one run each)")


def _note(answers: Mapping[str, Answer], attention_backend: str) -> str | None:
    """Say that no layer ran sparse, by token sparsity or by a pattern; None if one did."""
    report = answers["sparse"].report
    records = report.last_prefill() if report else []
    ran_sparse = any("sparse" in record.paths for record in records)
    if ran_sparse or LEADING_PATTERN.match(attention_backend):
        return None
    reasons = dict.fromkeys(reason for record in records for reason in record.reasons if reason)
    why = "; ".join(reasons) or "the prompt has one token"
    compared = ": this compares dense with dense" if "dense" in answers else ""
    return f"'sparse' ran dense in every layer ({why}){compared}"


def layer_table(records: list[LayerRecord]) -> Table:
    """Return a table of what each layer did."""
    from rich.markup import escape
    from rich.table import Table

    from token_sparse_attention.integrations.record import describe, path_name

    table = Table("layer", "path", "kept", "by head", "tokens kept per head, or why dense")
    for record in records:
        share = f"{record.kept_share:.1%}"
        bars = _bars(record)
        what = escape(describe(record))
        table.add_row(str(record.layer), path_name(record), share, bars, what)
    return table


def _bars(record: LayerRecord) -> str:
    """Return a bar for each head of the first sequence: the share of tokens that it keeps."""
    if record.kept is None or len(record.kept[0]) > _MOST_BARS:
        return ""
    return "".join(_BARS[round(n / record.kv_len * (len(_BARS) - 1))] for n in record.kept[0])
