"""Side-by-side measurements, each a command (`python -m bench.NAME`) that writes what it found to bench/results/."""
