"""``tsa capture``: which text every layer and head keeps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from token_sparse_attention.checks import check_apart, check_writable
from token_sparse_attention.cli.command import Command, print_json, warn, working
from token_sparse_attention.cli.model import (
    ModelOptions,
    PromptOptions,
    check_length,
    require_transformers,
)
from token_sparse_attention.errors import running, within_memory
from token_sparse_attention.options import Tokens
from token_sparse_attention.records import save
from token_sparse_attention.settings import settings_or_default

if TYPE_CHECKING:
    from token_sparse_attention.report.kept_text import KeptText


@dataclass(frozen=True, kw_only=True)
class Capture(Command):
    """Note which text of a prompt every layer and head keeps, for tsa report.

    Attributes:
        out: the capture to write
        max_new_tokens: most tokens of the reply
    """

    name: ClassVar[str] = "capture"
    example: ClassVar[str] = (
        'tsa capture --prompt-file report.txt --question "Who signed?" --out kept.json\n'
        "tsa report kept.json --out report.html"
    )
    prompt: PromptOptions
    out: Path
    max_new_tokens: Tokens = 32
    model: ModelOptions

    def run(self) -> bool:
        """Read the prompt sparsely, and write what was kept."""
        self.model.check()
        document = self.prompt.read()
        check_apart({"--out": self.out}, [self.prompt.prompt_file])
        check_writable(self.out, f"--out {self.out}")
        require_transformers()
        kept = self._capture(document)
        save(self.out, kept.to_json(), f"--out {self.out}")
        sparse = [n for n, layer in enumerate(kept.layers) if layer.dense_reason is None]
        if not sparse:
            reasons = dict.fromkeys(str(layer.dense_reason) for layer in kept.layers)
            warn(f"no layer ran sparse: {'; '.join(reasons)}")
        if self.json:
            facts = {
                "written": str(self.out),
                "prompt_tokens": len(kept.tokens),
                "sparse_layers": sparse,
                "reply": kept.reply,
            }
            print_json(facts)
        else:
            print(f"{self.out}: {len(kept.tokens):,} tokens, {len(sparse)} sparse layers")
        return True

    def _capture(self, document: str) -> KeptText:
        from token_sparse_attention import run
        from token_sparse_attention.report.capture import capture

        name, prompt = self.model.path, self.prompt
        config, source = settings_or_default(prompt.config, name)
        with working(f"loading {name}") as status:
            model, tokenizer = self.model.load()
            ids = run.encode_prompt(tokenizer, document, prompt.question)
            check_length(model, ids, self.max_new_tokens)
            status.update(f"reading {ids.shape[1]:,} tokens")
            asked = {
                "model": self.model.recorded,
                "dtype": str(model.dtype).removeprefix("torch."),
                "question": prompt.question,
                "config": json.loads(config.to_json()),
                "config_source": source,
                "impl": self.model.impl,
                "attention_backend": prompt.attention_backend,
            }
            with running(name, "run sparse"), within_memory(ids.shape[1], "sparse"):
                return capture(
                    model,
                    tokenizer,
                    ids,
                    config,
                    arguments=asked,
                    max_new_tokens=self.max_new_tokens,
                    impl=self.model.impl,
                    attention_backend=prompt.attention_backend,
                )
