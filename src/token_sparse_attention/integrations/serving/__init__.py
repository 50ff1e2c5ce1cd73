"""What the plugins of serving engines share: settings, the plan of a step, probes, counters.

Nothing here imports an engine.
"""
