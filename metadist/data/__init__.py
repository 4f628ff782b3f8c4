"""Where examples come from: sources, built once into memory-mapped tables that all processes of a machine share."""
