"""Verification without a model: seal, raw observations, redrawing, tracing, verdicts, and forgeries that test it all."""
