"""The one place where speed is measured: compared in one run, in turn, medians over repetitions."""
