"""The commands: what ``moco-d2 NAME`` and the scripts in tools/ run."""
