"""One script per figure; each prints ours, the baseline and the limit, and stores JSON in `results/`."""
