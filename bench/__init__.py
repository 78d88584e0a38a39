"""The benchmark: Mycel against no mesh and against Envoy, on the same cores in the same run.

Owns the rows, the interleaving of rounds, the statistics and the format of ``build/bench.json``. It brings up its
topologies through ``lab`` and measures what users run: no process has a setting that only the benchmark uses.
"""
