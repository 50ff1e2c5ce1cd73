"""The SGLang plugin: long prefills run sparse, everything else on one of SGLang's backends.

Start at `plugin`, which SGLang calls. Nothing here imports SGLang when it is imported.
"""
