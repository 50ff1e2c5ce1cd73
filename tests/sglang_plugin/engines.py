"""SGLang's engine on a CPU, with the bundled model; its scheduler is another process."""

from __future__ import annotations

import dataclasses
import json
import os

from token_sparse_attention import bundled
from vllm_plugin.engines import SAMPLING

# In few layers: else a rounding error that changes one sample changes everything after it.
CONFIG = dataclasses.replace(SAMPLING, sparse_layers=(2, 5, 8), dense_queries=0)


class Engine:
    """A running engine.

    Args:
        metrics: an empty folder for its counts.
        config: of the plugin.
        changes: to the usual arguments of SGLang's.
    """

    def __init__(self, metrics, config=CONFIG, **changes):
        import sglang

        given = {"token_sparse_attention": {"config": config.to_dict(), "log_interval": 0}}
        arguments = {
            "model_path": str(bundled.MODEL),
            "device": "cpu",
            "dtype": "float32",
            "attention_backend": "tsa",
            "json_model_override_args": json.dumps(given),
            "sampling_backend": "pytorch",
            "grammar_backend": "none",
            "skip_tokenizer_init": True,
            "max_total_tokens": 16384,
            "context_length": 8192,
            "chunked_prefill_size": 8192,
        }
        self._metrics = metrics
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)  # of the processes it starts
        try:
            self._engine = sglang.Engine(**arguments | changes)
        finally:
            del os.environ["PROMETHEUS_MULTIPROC_DIR"]

    def stop(self):
        self._engine.shutdown()

    def forget(self):
        """Empty the radix cache."""
        self._engine.flush_cache()

    def generate(self, prompts, new_tokens=1):
        """Return each prompt's reply, greedy: its tokens, logprobs, and what the cache held.

        The logprobs are one mapping from tokens to logprobs for each token of the reply.
        """
        outputs = self._engine.generate(
            input_ids=prompts,
            sampling_params={"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True},
            return_logprob=True,
            top_logprobs_num=20,
        )
        return [
            (
                output["output_ids"],
                [
                    {token: logprob for logprob, token, _ in entries}
                    for entries in output["meta_info"]["output_top_logprobs"]
                ],
                output["meta_info"]["cached_tokens"],
            )
            for output in outputs
        ]

    def counts(self):
        """Return the plugin's metrics; they are those before the last prompt."""
        from prometheus_client import CollectorRegistry, multiprocess

        self.generate([[5, 6, 7]])  # counts are published when a batch of prompts begins
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, path=str(self._metrics))
        found = {}
        for metric in registry.collect():
            for sample in metric.samples:
                if sample.name.startswith("token_sparse_attention_"):
                    name = sample.name.removeprefix("token_sparse_attention_")
                    key = (name.removesuffix("_total"), *sorted(sample.labels.values()))
                    found[key] = found.get(key, 0) + int(sample.value)
        return found


def distance(one, other):
    """The largest difference between logprobs of tokens that both list."""
    both = one.keys() & other.keys()
    assert both
    return max(abs(one[token] - other[token]) for token in both)
