"""The vLLM plugin: long prefills run sparse, everything else on the stock backend.

Start at `plugin`, which vLLM calls; `backend` is what both devices share. Only `cpu` and
`cuda` import vLLM when they are imported.
"""
