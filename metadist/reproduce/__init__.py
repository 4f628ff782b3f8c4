"""Published tables run again: our figure beside theirs, with budget and command."""
