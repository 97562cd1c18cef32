"""Parts of ``benchmarks/sae.py``: clocks, data, workers, rounds, tables and figures."""
