"""``tsa calibrate``: a profile of a model's layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from token_sparse_attention import bundled
from token_sparse_attention.calibration.options import CalibrationOptions
from token_sparse_attention.checks import check_apart, check_writable
from token_sparse_attention.cli.command import Command, output, warn, working
from token_sparse_attention.cli.model import (
    DenseKernel,
    ModelOptions,
    check_length,
    read_text,
    require_transformers,
)
from token_sparse_attention.config import KVSamplingConfig, SparseConfig, TokenSelectionConfig
from token_sparse_attention.errors import UsageError, running, tokenizing, within_memory
from token_sparse_attention.options import Count, Option
from token_sparse_attention.profile import LayerProfile
from token_sparse_attention.records import save
from token_sparse_attention.settings import default_config, read_settings

if TYPE_CHECKING:
    from token_sparse_attention.calibration.prompts import Prompt
    from token_sparse_attention.calibration.record import CalibrationResult

_LENGTH, _PROMPTS = 4096, 4


@dataclass(frozen=True, kw_only=True)
class PromptsOptions:
    """What to measure on.

    Attributes:
        text: text to cut prompts from; may be repeated
        prompts: prompts instead: one {"prompt": ..., "continuation": ...} a line, continuation
            optional
        length: tokens of each prompt cut from text
        num_prompts: how many prompts
    """

    text: Annotated[
        tuple[Path, ...], Option(metavar="FILE", default="the demo's document", repeat=True)
    ] = ()
    prompts: Annotated[Path | None, Option(metavar="FILE.jsonl")] = None
    length: Annotated[Count | None, Option(default=str(_LENGTH))] = None
    num_prompts: Annotated[
        Count | None, Option(default=f"{_PROMPTS} from text, all of a prompt file")
    ] = None

    def paths(self) -> tuple[Path, ...]:
        """Return the files of the texts to cut prompts from."""
        return () if self.prompts else self.text or (bundled.DEMO_DOCUMENT,)

    def cut(self, tokenizer: Any, texts: Sequence[str]) -> list[Prompt]:
        """Return the prompts of the file, or those cut from the texts."""
        from token_sparse_attention.calibration import prompts

        if self.prompts:
            return prompts.file_prompts(tokenizer, self.prompts, self.num_prompts)
        length = self.length or _LENGTH
        for path, text in zip(self.paths(), texts):
            tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            if tokens < length:
                warn(f"{path} has {tokens} tokens, which are repeated to fill {length}")
        count = self.num_prompts or _PROMPTS
        return prompts.text_prompts(tokenizer, texts, length, count)


@dataclass(frozen=True, kw_only=True)
class Calibrate(Command):
    """Measure which layers of a model tolerate sparsity, and write a profile of them.

    Attributes:
        config: the settings, as in tsa run; of a profile, its base, which layers start from
        measured: choose again, for another goal, from an earlier FILE.measured.json; runs no
            model
        out: where to write the profile; what was measured goes to FILE.measured.json beside it
        plot: draw what was measured; .svg or .png
        attention_backend: which dense kernel attends
    """

    name: ClassVar[str] = "calibrate"
    example: ClassVar[str] = (
        "tsa calibrate --method drift --out profile.json\n"
        "tsa calibrate meta-llama/Llama-3.1-8B-Instruct --method sensitivity \\\n"
        "  --prompts prompts.jsonl --target-speedup 4 --out profile.json --plot plot.svg\n"
        "tsa calibrate --method sensitivity --values 256,1024 \\\n"
        "  --text book.txt --length 32768 --target-speedup 2 --out profile.json\n"
        "tsa calibrate --method sensitivity --values 1024,4096 --heads-of 2 \\\n"
        "  --prompts prompts.jsonl --target-speedup 4 --out profile.json\n"
        "tsa calibrate --method sensitivity --measured profile.measured.json \\\n"
        "  --target-speedup 3 --out faster.json    (measures nothing)"
    )
    options: partial[CalibrationOptions]
    config: Annotated[
        str | None,
        Option(
            metavar="VALUE",
            default="published for drift, else the model folder's profile or the library's "
            "defaults",
        ),
    ] = None
    prompts: PromptsOptions
    measured: Path | None = None
    out: Annotated[Path | None, Option(metavar="FILE.json")] = None
    plot: Path | None = None
    model: ModelOptions
    attention_backend: DenseKernel = "auto"

    def run(self) -> bool:
        """Measure, choose, and write the profile."""
        if self.prompts.prompts and (self.prompts.text or self.prompts.length):
            raise UsageError("--prompts are used whole; --text and --length do not go with it")
        self.model.check()
        self._check_outputs()
        require_transformers()
        if self.plot:
            from token_sparse_attention.plots import check_plot

            check_plot(self.plot)
        result = self._choose_again(self.measured) if self.measured else self._measure()
        written = self._write(result)
        if self.json:
            print(result.to_json(), end="")
        else:
            _show(result, written)
        return not result.failure

    def _check_outputs(self) -> None:
        """Refuse files that could not be written."""
        if self.out is not None:
            check_writable(self.out, f"--out {self.out}")
        measured = measured_path(self.out) if self.out else None
        reads = (*self.prompts.text, self.prompts.prompts, self.measured)
        check_apart(
            {"--out": self.out, "--out's measured": measured, "--plot": self.plot},
            filter(None, reads),
        )
        if measured is not None:
            check_writable(measured, f"--out {self.out}: {measured}")
        if self.plot is not None:
            check_writable(self.plot, f"--plot {self.plot}")

    def _measure(self) -> CalibrationResult:
        from token_sparse_attention.calibration import job
        from token_sparse_attention.integrations.implementation import use_own_kernels
        from token_sparse_attention.run import check_prompt

        name = self.model.path
        texts = [read_text("--text", path) for path in self.prompts.paths()]
        try:
            options = self.options(
                base=self._base(),
                impl=self.model.impl,
                attention_backend=self.attention_backend,
            )
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error
        with working(f"loading {name}") as status:
            model, tokenizer = self.model.load()
            use_own_kernels(model, self.attention_backend)
            with tokenizing():
                prompts = self.prompts.cut(tokenizer, texts)
            lengths = [prompt.ids.shape[1] for prompt in prompts]
            for prompt in prompts:
                check_prompt(model, prompt.read_ids)
            check_length(
                model, max((prompt.ids for prompt in prompts), key=lambda ids: ids.shape[1])
            )
            _warn_of_covering(options, min(lengths))
            with running(name, "calibrated"), within_memory(max(lengths), "calibrating"):
                return job.calibrate(
                    model,
                    prompts,
                    options,
                    name=self.model.recorded,
                    arguments=self.asked_but("model", "out", "plot"),
                    on_progress=status.update,
                )

    def _choose_again(self, measured: Path) -> CalibrationResult:
        """Choose from what was measured before."""
        from token_sparse_attention.calibration import job
        from token_sparse_attention.calibration.record import CalibrationResult

        fixed = (
            "model", "text", "prompts", "length", "num_prompts", "config", "values", "heads_of",
        )  # fmt: skip
        given = [name.replace("_", "-") for name in fixed if self.asked[name]]
        if given:
            raise UsageError(f"--measured says what was measured; {given[0]} does not go with it")
        before = CalibrationResult.load(measured)
        goal = {name: self.asked[name] for name in ("divergence_budget", "target_speedup")}
        try:
            options = CalibrationOptions(self.asked["method"], before.base, **goal)
            result = job.choose_again(before, options)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--measured {measured}: {error}") from error
        return dataclasses.replace(result, arguments={**before.arguments, **goal})

    def _base(self) -> SparseConfig:
        """Return the settings that every layer starts from."""
        name = self.model.path
        if self.config is not None:
            return _without_layers(read_settings(self.config, name))
        if self.asked["method"] == "drift":
            return TokenSelectionConfig()
        base = _without_layers(default_config(name)[0])
        return dataclasses.replace(base, sparse_layers=None)

    def _write(self, result: CalibrationResult) -> list[Path]:
        contents: dict[Path, str | bytes] = {}
        if self.out is not None:
            contents[measured_path(self.out)] = result.to_json()
            if result.profile is not None:
                contents[self.out] = result.profile.to_json() + "\n"
        if self.plot is not None:
            from token_sparse_attention.calibration.show import draw

            contents[self.plot] = draw(result, self.plot.suffix)
        for path, content in contents.items():
            save(path, content)
        return list(contents)


def measured_path(profile: Path) -> Path:
    """Return where what was measured is written, beside the profile."""
    return profile.with_name(f"{profile.stem}.measured.json")


def _without_layers(settings: SparseConfig | LayerProfile) -> SparseConfig:
    return settings.base if isinstance(settings, LayerProfile) else settings


def _warn_of_covering(options: CalibrationOptions, shortest: int) -> None:
    """Say which numbers of samples leave nothing out of the prompts."""
    if options.method == "drift" or not isinstance(options.base, KVSamplingConfig):
        return
    window = options.base.sliding_window
    for setting in options.settings:
        if setting.value + window >= shortest:
            warn(
                f"{setting.value} samples and the window of {window} cover a prompt of "
                f"{shortest} tokens, which then counts as dense; take longer prompts"
            )


def _show(result: CalibrationResult, written: Sequence[Path]) -> None:
    from rich.markup import escape

    from token_sparse_attention.calibration.show import layer_table, sentences

    console = output()
    device = result.provenance.get("device", "an unknown device")
    console.print(
        f"[bold]{escape(result.model)}[/], {escape(result.dtype)}, on {escape(str(device))}"
    )
    console.print(layer_table(result))
    for sentence in sentences(result):
        console.print(sentence, markup=False, highlight=False)
    for path in written:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
