"""lm-evaluation-harness with sparse prefills: its model ``tsa``, which is its ``hf`` made sparse.

``python -m token_sparse_attention.integrations.lm_eval run --model tsa ...`` is lm-eval's own
command with that model in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.errors import JobFailedError, UsageError
from token_sparse_attention.integrations.record import PrefillReport
from token_sparse_attention.integrations.transformers import apply
from token_sparse_attention.settings import Settings, read_settings

try:
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("this needs lm-eval: pip install 'token-sparse-attention[eval]'") from error

NAME = "tsa"
_MODULE = "token_sparse_attention.integrations.lm_eval"  # also where this file runs as a script


class SparseHFLM(HFLM):
    """lm-eval's Hugging Face model, prefilling sparsely.

    A reply's prompt is prefilled sparsely and the reply decoded densely. For a log-likelihood
    the continuation is part of the prefill; by default its last 128 tokens attend densely.

    Args:
        pretrained: hub id, folder, or a model, as for ``HFLM``.
        sparse_config: what ``tsa run --config`` takes, or settings, or their JSON object.
        impl: which code scores and chooses, see `Execution`.
        attention_backend: which kernel or pattern attends in the sparse layers, see `Execution`.
        hflm: further arguments of ``HFLM``.

    Attributes:
        report: what every layer did, see `PrefillReport`.

    Raises:
        UsageError: if the settings cannot be read.
        ValueError: if the model cannot be served.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        sparse_config: str | Settings | Mapping[str, Any] = "default",
        impl: str = "auto",
        attention_backend: str | PatternConfig = "auto",
        **hflm: Any,
    ) -> None:
        if isinstance(sparse_config, Mapping):  # as lm-eval reads JSON among its arguments
            sparse_config = json.dumps(sparse_config)
        if isinstance(sparse_config, str):  # before the model is loaded
            name = str(getattr(pretrained, "name_or_path", pretrained))
            sparse_config = read_settings(sparse_config, name, f"sparse_config {sparse_config}")
        super().__init__(pretrained, **hflm)
        applied = apply(self.model, sparse_config, impl=impl, attention_backend=attention_backend)
        self.report: PrefillReport = applied.report
        self._ran_sparse = False

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Reply to prompts.

        Raises:
            JobFailedError: if all of them ran dense; the message says why.
        """
        replies: list[str] = self._checked(super().generate_until, requests, disable_tqdm)
        return replies

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], *options: Any, **named: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]]
        results = self._checked(super()._loglikelihood_tokens, requests, *options, **named)
        return results

    def _checked(self, answer: Any, requests: Sequence[Any], *options: Any, **named: Any) -> Any:
        """Answer requests, some of which must have run sparse: lm-eval gives all at once."""
        self._ran_sparse = False
        answers = answer(requests, *options, **named)
        records = self.report.last_prefill()
        if records and not self._ran_sparse:
            reasons = dict.fromkeys(reason for record in records for reason in record.reasons)
            why = "; ".join(map(str, reasons))
            raise JobFailedError(f"no layer ran sparse in any prompt: {why}")
        return answers

    def _model_call(self, inps: Tensor, *masked: Any, **named: Any) -> Tensor:
        if len(inps) > 1:  # padded on the right without a mask, so that padding would score keys
            raise UsageError(
                f"batch_size must be 1 for log-likelihoods, got {len(inps)} sequences"
            )
        logits: Tensor = super()._model_call(inps, *masked, **named)
        self._notice()
        return logits

    def _model_generate(self, context: Tensor, *options: Any, **named: Any) -> Tensor:
        generated: Tensor = super()._model_generate(context, *options, **named)
        self._notice()
        return generated

    def _notice(self) -> None:
        """Note whether a layer ran sparse; the report forgets old prefills."""
        if not self._ran_sparse:
            records = self.report.last_prefill()
            self._ran_sparse = any("sparse" in record.paths for record in records)


def register() -> None:
    """Make ``tsa`` a name of lm-eval's models; doing it again changes nothing."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=f"{_MODULE}:{SparseHFLM.__name__}")


def main() -> int:
    """Run lm-eval's command line, which then knows the model, and return the exit code."""
    from lm_eval.__main__ import cli_evaluate

    register()
    try:
        cli_evaluate()
    except (UsageError, JobFailedError) as error:
        print(f"tsa: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
